"""Intel's OpenMP runtime, which vLLM wants preloaded for speculation, also runs our kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engines import engine, generate, prompts_of
from tests.support.models import ModelStore

RUNTIME = Path(sys.prefix, "lib", "libiomp5.so")
HERE = str(Path(__file__).resolve().parents[2])

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from bmc_core.machine import openmp
from tests.support.engines import engine, flush, generate
from tests.support.reference import Case, assert_matches_reference
import torch

for dtype in (torch.float32, torch.bfloat16):
    for rows in (1, 2, 5, 9):
        lengths = [700, 33, 64, 1000]
        assert_matches_reference(Case(lengths, [rows] * 4, dtype=dtype, seed=rows))
draft = {"method": "draft_model", "model": sys.argv[2], "num_speculative_tokens": 3}
with engine(sys.argv[2], "BMC", speculative_config=draft) as llm:
    tokens = generate(llm, json.loads(sys.argv[3]))
    flush(llm)
print("RESULT " + json.dumps([openmp.serving(), tokens]))
"""


@pytest.mark.skipif(not RUNTIME.exists(), reason="intel-openmp is not installed")
def test_preloaded(model_dir: ModelStore) -> None:
    prompts = prompts_of([150, 20, 64])
    with engine(model_dir("llama-gqa"), "CPU_ATTN") as llm:
        expected = generate(llm, prompts)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, HERE, model_dir("llama-gqa"), json.dumps(prompts)],
        env={**os.environ, "LD_PRELOAD": str(RUNTIME), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert json.loads(line.removeprefix("RESULT ")) == [RUNTIME.name, expected]
    assert f"threads of {RUNTIME.name}" in log
