"""A parked draft model costs nothing and comes back whole. Draft = target: all is accepted."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from vllm import LLM

from bmc_core.speculation import StepCosts, StepTimes
from bmc_vllm.drafters.clock import STEP_COSTS, STEP_TIMES
from bmc_vllm.drafters.drafting import DRAFTERS
from bmc_vllm.drafters.lookup import draft_tokens
from tests.support.engines import engine, flush, generate, prompts_of, worker
from tests.support.models import ModelStore
from tests.support.steering import Steering

MODEL = "llama-gqa"
MOST = 4
Expected = Callable[[list[list[int]], int], list[list[int]]]


@contextmanager
def speculating(
    model_dir: ModelStore, draft: str = MODEL, bmc: dict[str, Any] | None = None, **settings: Any
) -> Iterator[LLM]:
    """An engine with draft model and `MOST` draft tokens wherever there is room for them."""
    speculative = {
        "method": "draft_model",
        "model": model_dir(draft),
        "num_speculative_tokens": MOST,
        **settings.pop("speculative", {}),
    }
    with engine(
        model_dir(MODEL),
        "BMC",
        speculative_config=speculative,
        additional_config={"bmc": {"r": 64, "draft_length": "fixed", **(bmc or {})}},
        **settings,
    ) as llm:
        yield llm


COPIER = list(range(1, 401))  # nearly every token that follows occurred before
PROMPTS = [
    COPIER,
    *(
        p
        for lengths in ([20, 33, 7], [70, 10], [100, 10], [60, 61, 62], [37])
        for p in prompts_of(lengths)
    ),
]


@pytest.fixture(scope="module")
def expected(model_dir: ModelStore) -> Expected:
    """Greedy tokens without speculation, of any of `PROMPTS`."""
    with engine(model_dir(MODEL), "CPU_ATTN") as llm:
        tokens = dict(zip(map(tuple, PROMPTS), generate(llm, PROMPTS, 120), strict=True))
    return lambda prompts, count: [tokens[tuple(prompt)][:count] for prompt in prompts]


def test_parks_for_nothing_and_comes_back_whole(model_dir: ModelStore, expected: Expected) -> None:
    prompts = prompts_of([20, 33, 7])
    with speculating(model_dir) as llm:
        steering = Steering(llm, lambda step: 0 if 5 <= step < 25 else MOST)
        tokens = generate(llm, prompts, 70)
        flush(llm)
    assert tokens == expected(prompts, 70)
    assert not any(step in steering.forwards for step in range(5, 25)), "parked"
    for since, before in ((0, 25), (25, 10**9)):
        accepted, drafted = steering.accepted(since, before)
        assert accepted == drafted > 20
    missed = steering.forwards[25][0]
    assert missed >= 3 * 18, "one pass over the rows of all parked steps"
    assert len(steering.forwards[25]) == 1 + MOST


def test_a_pass_over_missed_rows_fits_the_buffers(model_dir: ModelStore) -> None:
    prompts = prompts_of([9, 12])
    with speculating(model_dir, max_num_batched_tokens=32, max_num_seqs=4) as llm:
        steering = Steering(llm, lambda step: 0 if 3 <= step < 30 else MOST)
        generate(llm, prompts, 60)
        flush(llm)
    assert max(rows for passes in steering.forwards.values() for rows in passes) <= 32
    accepted, drafted = steering.accepted(30)
    assert accepted == drafted > 10


def test_prompts_are_computed_while_parked(model_dir: ModelStore) -> None:
    """A prompt that arrives while others are parked: its rows, and no others, in one pass."""
    with speculating(model_dir) as llm:
        steering = Steering(llm, lambda step: MOST if step > 12 else 0)
        generate(llm, prompts_of([40]), 6)
        generate(llm, prompts_of([50], seed=2), 40)
        flush(llm)
    rows = {step: passes for step, passes in steering.forwards.items() if step <= 12}
    assert list(rows.values()) == [[40], [50]]
    accepted, drafted = steering.accepted()
    assert accepted == drafted > 10


def test_near_the_limit(model_dir: ModelStore, expected: Expected) -> None:
    """One request at the model's limit costs the others nothing, then and later."""
    prompts = prompts_of([100, 10])
    with speculating(model_dir, max_model_len=128) as llm:
        steering = Steering(llm, lambda step: MOST)
        tokens = generate(llm, prompts, 60)
        flush(llm)
    assert tokens == [*expected(prompts[:1], 28), *expected(prompts[1:], 60)]
    accepted, drafted = steering.accepted()
    assert accepted == drafted > 60


def test_beyond_a_shorter_drafts_limit(model_dir: ModelStore, expected: Expected) -> None:
    """While one request is too long for the draft model none has drafts; the other's rows are
    made up for as soon as it is gone."""
    prompts = prompts_of([70, 10])
    with speculating(model_dir, speculative={"max_model_len": 64}) as llm:
        steering = Steering(llm, lambda step: MOST)
        tokens = generate(llm, prompts, 50, abort_after={0: 20})
        flush(llm)
    assert tokens[1] == expected(prompts[1:], 50)[0]
    accepted, drafted = steering.accepted()
    assert accepted == drafted > 20
    assert min(steering.forwards) == 21
    assert steering.forwards[21][0] > 25, "the rows of twenty steps"


def test_preempted_and_resumed(model_dir: ModelStore, expected: Expected) -> None:
    """In a pool this small drafts are now and then made without the rows to write them to; those
    are lost, and nothing else is."""
    prompts = prompts_of([60, 61, 62])
    settings = {"max_model_len": 256, "kv_cache_memory_bytes": 15 * 64 << 10}
    with speculating(model_dir, **settings) as llm:
        steering = Steering(llm, lambda step: 0 if step % 7 in (3, 4, 5) else MOST)
        tokens = generate(llm, prompts, 120)
        flush(llm)
    assert tokens == expected(prompts, 120)
    (request,) = set(steering.preempted)
    resumed = [(a, d) for _, name, d, a in steering.drafts if name == request][-6:]
    assert all(accepted == drafted for accepted, drafted in resumed)
    accepted, drafted = steering.accepted()
    assert accepted >= 0.9 * drafted > 100


def test_a_prefix_that_was_computed_while_parked(model_dir: ModelStore) -> None:
    """Blocks of the prefix cache that the draft model never saw are made up for."""
    prompt = prompts_of([40])[0]
    with speculating(model_dir) as llm:
        steering = Steering(llm, lambda step: 0 if step < 150 else MOST)
        answer = generate(llm, [prompt], 100)[0]
        steering.step = 200
        generate(llm, [prompt + answer + [3, 4]], 30)
        flush(llm)
    assert steering.forwards[1] == [40]
    assert steering.forwards[201][0] > 80
    accepted, drafted = steering.accepted(200)
    assert accepted == drafted > 15


def test_step_times(model_dir: ModelStore) -> None:
    with speculating(model_dir, bmc={"draft_length": "auto"}) as llm:
        steering = Steering(llm, lambda step: 0 if step % 2 else 3)
        generate(llm, prompts_of([9]), 12)
        flush(llm)
    outputs = [output for output in steering.outputs if output.req_ids]
    for place, output in enumerate(outputs, 1):
        times = getattr(pickle.loads(pickle.dumps(output)), STEP_TIMES)
        assert isinstance(times, StepTimes)
        assert times.forward > 0
        assert times.sampling > 0
        drafts = place % 2 == 0
        assert (times.draft_steps, times.drafting > 0) == ((3, True) if drafts else (0, False))
    costs = [getattr(output, STEP_COSTS, None) for output in outputs]
    assert isinstance(costs[0], StepCosts)
    assert not any(costs[1:])


def test_costs_at_the_start(model_dir: ModelStore, vllm_log: list[str]) -> None:
    with speculating(model_dir, bmc={"draft_length": "auto"}, max_num_seqs=8) as llm:
        costs = worker(llm)._clock.costs
    assert {1, 8, 32} <= {rows for rows, _ in costs.forward}
    assert max(rows for rows, _ in costs.forward) == 8 * (MOST + 1)
    assert [rows for rows, _ in costs.attention] == [1, 2, 3, 5]
    assert {1, 8} <= {batch for batch, _ in costs.draft}
    for curve in (costs.forward, costs.attention, costs.draft, costs.draft_attention):
        assert all(seconds > 0 for _, seconds in curve)
    assert [rows for rows, _ in costs.sampler] == [1, 5, 20, 40]
    (line,) = [line for line in vllm_log if line.startswith("BMC: speculation: a step")]
    assert "draft step" in line


def test_two_drafters(model_dir: ModelStore, expected: Expected) -> None:
    """Copied where the last token occurred before; the draft model for the others, and not at all
    where every request copies."""
    other = prompts_of([37])[0]
    lookup = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with speculating(model_dir, bmc=lookup) as llm:
        steering = Steering(llm, lambda step: MOST)
        tokens = generate(llm, [COPIER, other], 40)
        together = steering.step
        tokens += generate(llm, [COPIER], 40)
        flush(llm)
    assert tokens == expected([COPIER, other, COPIER], 40)
    names = [dict(zip(t.req_ids, getattr(t, DRAFTERS), strict=True)) for t in steering.taken]
    assert {frozenset(made.values()) for made in names[:together]} >= {
        frozenset({"ngram", "draft_model"}),
        frozenset({"draft_model"}),
    }
    idle = [step for step, made in enumerate(names, 1) if set(made.values()) == {"ngram"}]
    assert len(idle) > 10
    # A prompt is computed even so; of two requests both may copy, once the prompts are through.
    assert not any(step in steering.forwards for step in idle if step not in (1, together + 1))
    of_model = [
        (accepted, drafted)
        for step, request, drafted, accepted in steering.drafts
        if names[step - 2].get(request) == "draft_model"
    ]
    assert len(of_model) > 5
    assert all(accepted == drafted for accepted, drafted in of_model)


def test_copied_drafts_are_the_requests_own_text(model_dir: ModelStore) -> None:
    lookup = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with speculating(model_dir, bmc=lookup, draft="llama-draft") as llm:
        steering = Steering(llm, lambda step: 0)
        generate(llm, [COPIER], 30)
        flush(llm)
    text, copied = list(COPIER), 0
    outputs = [output for output in steering.outputs if output.req_ids]
    for output, taken in zip(outputs, steering.taken, strict=True):
        text += output.sampled_token_ids[0]
        drafts = draft_tokens(np.array(text), MOST, 1, 3)
        assert taken.draft_token_ids == [drafts]
        copied += bool(drafts)
    assert copied > 10
    assert set(steering.forwards) == {1}, "the draft model is parked"
