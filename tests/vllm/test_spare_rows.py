"""Drafts in spare rows in a real engine, whose null block is poison: its tokens are plain greedy's.

The draft model is the target itself: every draft token is right unless rows were lost.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from vllm import LLM, SamplingParams

from bmc_vllm.drafts import TAKEN_BACK
from tests.support.engines import check, engine, flush, generate, prompts_of, scheduler, worker
from tests.support.models import ModelStore

MODEL = "llama-gqa"
PROMPTS = prompts_of([12, 40, 70])
TOKENS = 48


@pytest.fixture(scope="module")
def expected(model_dir: ModelStore) -> list[list[int]]:
    with engine(model_dir(MODEL), "CPU_ATTN") as llm:
        return generate(llm, PROMPTS, TOKENS)


@contextmanager
def speculating(model_dir: ModelStore, length: str = "fixed", **settings) -> Iterator[LLM]:
    speculative = {"method": "draft_model", "model": model_dir(MODEL), "num_speculative_tokens": 5}
    bmc = {"r": 64, "draft_length": length}
    options = {"speculative_config": speculative, "additional_config": {"bmc": bmc}}
    with engine(model_dir(MODEL), "BMC", block_size=16, **{**options, **settings}) as llm:
        yield llm


def poison(llm: LLM) -> None:
    """What no token may depend on: rows that a drafter writes and reads beyond those it has."""
    for layer in worker(llm).compilation_config.static_forward_context.values():
        layer.kv_cache[0].fill_(math.nan)


def serve(llm: LLM, arrivals: dict[int, int], aborts: dict[int, int] | None = None) -> dict:
    """Tokens by prompt.

    Args:
        arrivals: step -> the prompt that arrives before it.
        aborts: step -> the prompt that is aborted after it.
    """
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    tokens: dict[int, list[int]] = {}
    now = 0
    while llm.llm_engine.has_unfinished_requests() or now <= max(arrivals):
        if now in arrivals:
            prompt = {"prompt_token_ids": PROMPTS[arrivals[now]]}
            llm.llm_engine.add_request(str(arrivals[now]), prompt, params)
        poison(llm)
        for output in llm.llm_engine.step():
            tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        check(llm)
        if now in (aborts or {}):
            llm.llm_engine.abort_request([str(aborts[now])])
            check(llm)
        now += 1
    return tokens


def test_every_draft_of_the_target_itself_is_right(
    model_dir: ModelStore, expected: list[list[int]]
) -> None:
    with speculating(model_dir) as llm:
        tokens = serve(llm, {0: 0, 1: 1, 3: 2})
        assert tokens == dict(enumerate(expected))
        stats = scheduler(llm).drafts.stats()
        # Each step of a request gives as many tokens as it verifies, and one more. A first draft
        # may have been made without rows of its own.
        made = sum((1 + k) * count for k, count in enumerate(stats.lengths))
        assert 0 <= made - len(PROMPTS) * (TOKENS - 1) <= 2
        assert sum(stats.lengths) <= 28, "24 steps of 6 tokens are needed"
        assert stats.growths > 0
        assert stats.rows_used == stats.rows_offered
        flush(llm)


def test_blocks_are_taken_back_from_a_living_batch(
    model_dir: ModelStore, expected: list[list[int]]
) -> None:
    """A pool of 12 blocks: requests are admitted by blocks that drafts held, and preempted."""
    small = {"num_gpu_blocks_override": 13, "max_model_len": 144, "enable_prefix_caching": False}
    with speculating(model_dir, **small) as llm:
        core = scheduler(llm)
        taken: list[str] = []
        schedule = core.schedule

        def watched(*args, **kwargs):
            output = schedule(*args, **kwargs)
            taken.extend(getattr(output, TAKEN_BACK, ()))
            preempted.extend(output.preempted_req_ids or ())
            return output

        preempted: list[str] = []
        core.schedule = watched
        for wait in range(1, 6):
            assert serve(llm, {0: 0, 1: 1, 1 + wait: 2}) == dict(enumerate(expected))
        assert taken
        assert preempted
        flush(llm)


def test_aborts_and_prefix_hits_in_mid_speculation(
    model_dir: ModelStore, expected: list[list[int]]
) -> None:
    with speculating(model_dir) as llm:
        first = serve(llm, {0: 0, 1: 1, 2: 2}, {4: 1, 6: 2})
        for prompt, tokens in first.items():
            assert tokens == expected[prompt][: len(tokens)]
        assert first[0] == expected[0]
        assert serve(llm, {0: 2, 1: 0, 2: 1}) == dict(enumerate(expected))
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() > 0
        flush(llm)


def test_the_length_that_pays_gives_the_same_tokens(
    model_dir: ModelStore, expected: list[list[int]]
) -> None:
    """Also within K tokens of the longest sequence, where vLLM's runner drafts token 0."""
    longest = len(PROMPTS[2]) + TOKENS
    with speculating(model_dir, "auto", max_model_len=longest) as llm:
        assert serve(llm, {0: 0, 1: 1, 3: 2}) == dict(enumerate(expected))
        flush(llm)
