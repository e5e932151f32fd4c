"""Two workers, two stages, two engines: tokens are those of CPU_ATTN in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, generate, prompts_of
from tests.support.models import ModelStore

LENGTHS = [5, 64, 129, 200]

SCRIPT = """
import asyncio, json, sys
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def answer(llm, index, prompt):
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)
    async for output in llm.generate({"prompt_token_ids": prompt}, params, str(index)):
        pass
    return list(output.outputs[0].token_ids)

async def main():
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=512,
        kv_cache_memory_bytes=32 << 20, attention_backend="BMC",
        additional_config={"bmc": {"r": 64, "release_free_memory": True}},
        **json.loads(sys.argv[3])))
    prompts = json.loads(sys.argv[2])
    tokens = await asyncio.gather(*(answer(llm, *prompt) for prompt in enumerate(prompts)))
    llm.shutdown()
    print("RESULT " + json.dumps(tokens))

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture(scope="module")
def expected(model_dir: ModelStore) -> list[list[int]]:
    with engine(model_dir("llama-gqa"), "CPU_ATTN") as llm:
        return generate(llm, prompts_of(LENGTHS))


# All prompts and answers take 39 blocks: requests are preempted.
SMALL = {"block_size": 16, "num_gpu_blocks_override": 34}
DRAFT = {"method": "draft_model", "num_speculative_tokens": 3}
EAGER = {"enforce_eager": True}
# vLLM 0.32 makes the buffers of a pipeline's second stage where it warms a compiled model up:
# eager pipelines end at the first step, with CPU_ATTN as well.
TRACED = {"compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}}


@pytest.mark.parametrize(
    ("settings", "start_lines"),
    [
        ({"tensor_parallel_size": 2, **EAGER}, 1),
        ({"tensor_parallel_size": 2, "speculative_config": DRAFT, **SMALL, **EAGER}, 1),
        ({"pipeline_parallel_size": 2, **TRACED}, 2),
        ({"data_parallel_size": 2, **EAGER}, 2),
    ],
    ids=["workers", "workers-draft", "stages", "engines"],
)
def test_two(
    model_dir: ModelStore,
    tmp_path: Path,
    expected: list[list[int]],
    settings: dict[str, Any],
    start_lines: int,
) -> None:
    """One worker a core; each engine and each stage says once what runs."""
    if "speculative_config" in settings:
        draft = {**settings["speculative_config"], "model": model_dir("llama-draft")}
        settings = {**settings, "speculative_config": draft}
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    prompts = json.dumps(prompts_of(LENGTHS))
    done = subprocess.run(
        [sys.executable, script, model_dir("llama-gqa"), prompts, json.dumps(settings)],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert json.loads(line.removeprefix("RESULT ")) == expected
    assert log.count("BMC: attention backend BMC") == start_lines
    assert log.count("BMC: speculation: a step of 1 row") == ("speculative_config" in settings)
