"""Builds engines, steps them by hand and checks the block pool after every step."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm import LLM, SamplingParams
from vllm.logprobs import Logprob

Prompt = list[int]
Tokens = list[int]

POOL_BYTES = 32 << 20


@contextmanager
def engine(model: str, backend: str | None, **settings: Any) -> Iterator[LLM]:
    """An engine in this process, thrown away at the end."""
    options = {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": POOL_BYTES,
        "seed": 0,
    }
    if backend is not None:
        options["attention_backend"] = backend
    llm = LLM(**{**options, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def scheduler(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def check(llm: LLM) -> None:
    """Integrity of the block pool, where the scheduler is ours."""
    if hasattr(scheduler(llm), "check_integrity"):
        scheduler(llm).check_integrity()


def generate(
    llm: LLM,
    prompts: Sequence[Prompt],
    max_tokens: int = 48,
    *,
    logprobs: int | None = None,
    abort_after: dict[int, int] | None = None,
) -> list[Tokens] | list[tuple[Tokens, list[dict[int, Logprob]]]]:
    """Greedy tokens of each prompt, all in flight at once.

    Args:
        logprobs: number of log-probabilities per token; results are then (tokens, logprobs).
        abort_after: prompt index -> number of steps after which the request is aborted; its
            result is what it had by then.
    """
    engine_ = llm.llm_engine
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
    )
    ids = [
        engine_.add_request(str(i), {"prompt_token_ids": prompt}, params)
        for i, prompt in enumerate(prompts)
    ]
    results: dict[str, Any] = {}
    steps = 0
    while engine_.has_unfinished_requests():
        for output in engine_.step():
            results[output.request_id] = output.outputs[0]
        check(llm)
        steps += 1
        for index, when in (abort_after or {}).items():
            if steps == when:
                engine_.abort_request([str(index)])
                check(llm)
    assert len(ids) == len(prompts)
    outputs = [results.get(str(i)) for i in range(len(prompts))]
    if logprobs is not None:
        return [(list(o.token_ids), list(o.logprobs)) for o in outputs]
    return [list(o.token_ids) if o is not None else [] for o in outputs]


def flush(llm: LLM) -> None:
    """The step without tokens that a server runs before it goes idle."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests():
        core.step_fn()
    check(llm)


def free_blocks(llm: LLM) -> int:
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def prompts_of(lengths: Sequence[int], seed: int = 1) -> list[Prompt]:
    """Prompts that share no prefix."""
    return [
        [(seed * 31 + i * 17 + j * (i + 3)) % 500 + 1 for j in range(length)]
        for i, length in enumerate(lengths)
    ]
