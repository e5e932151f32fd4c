"""Speculative decoding: verification batches give the tokens of plain greedy decoding.

A draft model never inherits the target's backend: its own is named in ``speculative_config``.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engines import engine, flush, generate, scheduler, worker
from tests.support.models import ModelStore

# Repetitive, so that the n-gram proposer finds something to propose.
PROMPTS = [[1, 2, 3, 4] * 10, list(range(5, 45)) * 2, [7]]


@pytest.fixture(scope="module")
def expected(model_dir: ModelStore) -> list[list[int]]:
    with engine(model_dir("llama-gqa"), "CPU_ATTN") as llm:
        return generate(llm, PROMPTS)


def backends(llm) -> dict[str, set[str]]:
    layers = worker(llm).compilation_config.static_forward_context.items()
    found: dict[str, set[str]] = {}
    for name, layer in layers:
        # Both models' layers share one namespace; vLLM prefixes the draft's.
        owner = "draft" if name.startswith("draft_model.") else "target"
        found.setdefault(owner, set()).add(layer.attn_backend.get_name())
    return found


NGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tests.support.engines import engine, flush, generate
speculative = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
settings = {"bmc": {"r": 64}}
with engine(sys.argv[2], "BMC", speculative_config=speculative, additional_config=settings) as llm:
    tokens = generate(llm, json.loads(sys.argv[3]))
    flush(llm)
print("RESULT " + json.dumps(tokens))
"""


def test_ngram(model_dir: ModelStore, expected: list[list[int]]) -> None:
    # In an interpreter of its own: the proposer imports numba, after which vLLM 0.32 cannot
    # build another engine in the same process (its kernel dispatcher trips over llvmlite).
    here = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", NGRAM, here, model_dir("llama-gqa"), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert json.loads(line.removeprefix("RESULT ")) == expected


@pytest.mark.parametrize(
    ("draft_backend", "draft_gets"), [("BMC", {"BMC"}), ("CPU_ATTN", {"CPU_ATTN"})]
)
def test_draft_model(
    model_dir: ModelStore, expected: list[list[int]], draft_backend: str, draft_gets: set[str]
) -> None:
    speculative = {
        "method": "draft_model",
        "model": model_dir("llama-mha"),
        "num_speculative_tokens": 3,
        "attention_backend": draft_backend,
    }
    with engine(
        model_dir("llama-gqa"),
        "BMC",
        speculative_config=speculative,
        additional_config={"bmc": {"r": 64}},
    ) as llm:
        assert generate(llm, PROMPTS) == expected
        assert backends(llm) == {"target": {"BMC"}, "draft": draft_gets}
        assert scheduler(llm).growth_stats().growths > 0
        flush(llm)
