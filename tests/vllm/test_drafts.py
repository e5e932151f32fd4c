"""Draft tokens on vLLM's real scheduler, without a model: where they go, and whom they disturb."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.utils.math_utils import cdiv
from vllm.v1.outputs import DraftTokenIds

from bmc_core.speculation import StepCosts, StepTimes
from bmc_vllm.drafters.clock import STEP_COSTS, STEP_TIMES
from bmc_vllm.drafters.drafting import DRAFTERS
from bmc_vllm.drafts import TAKEN_BACK
from bmc_vllm.metrics import FOLDER, _Collector
from tests.support.managers import BLOCK, KINDS
from tests.support.schedulers import (
    abort,
    add,
    drafts_of,
    finish,
    make_scheduler,
    sampled,
    step,
    table,
    tables,
)

R = 64
FAMILIES = 3
LIMITS = {"max_model_len": 200, "max_num_seqs": 5, "max_num_batched_tokens": 48}


def none(name: str, drafts: int) -> int:
    return 0


class Twins:
    """Two schedulers: one speculates, the other gets what that accepts as a gift.

    The gift takes no draft rows, no budget and no blocks ahead of time, so that the other schedules
    as if nobody had speculated. With a draft model it must have one too, but no drafts: vLLM keeps
    one token of the budget for each request then.
    """

    def __init__(
        self, num_blocks: int, kind: str, method: str, length: str, policy: str, caching: bool
    ) -> None:
        options = {**LIMITS, "scheduling_policy": policy, "enable_prefix_caching": caching}
        options |= {"kind": kind, "bmc": {"draft_length": length}}
        self.ours = make_scheduler(num_blocks, method, **options)
        plain = None if method == "ngram" else method
        self.plain = make_scheduler(num_blocks, plain, **options)
        self.plain.drafts = None
        self.both = (self.ours, self.plain)
        self.count = 0

    def add(self, prompt: list[int], priority: int) -> None:
        for scheduler in self.both:
            add(scheduler, f"r{self.count}", prompt, priority=priority)
        self.count += 1

    def abort(self, name: str) -> None:
        for scheduler in self.both:
            abort(scheduler, name)

    def step(self, accepted: Iterator[int]) -> None:
        waited = self.ours.get_request_counts()[1] > 0
        outputs = [scheduler.schedule() for scheduler in self.both]
        self.compare(*outputs)
        self.check_rows(waited)
        tokens = sampled(self.ours, outputs[0], lambda name, k: min(k, next(accepted)))
        given = {name: self.plain.requests[name].num_tokens for name in tokens}
        for scheduler, output in zip(self.both, outputs, strict=True):
            finish(scheduler, output, tokens, drafts=scheduler is self.ours)
        for name, count in given.items():
            request = self.plain.requests.get(name)
            if request is not None and request.num_tokens > count:
                request.num_computed_tokens += request.num_tokens - count - 1
        for scheduler in self.both:
            scheduler.check_integrity()
            scheduler.growth.queue.check()

    def compare(self, ours, plain) -> None:
        """The same requests run, wait, and were preempted, for as many tokens of their own."""
        drafts = drafts_of(ours)
        tokens = {name: n - drafts.get(name, 0) for name, n in ours.num_scheduled_tokens.items()}
        assert tokens == plain.num_scheduled_tokens
        assert ours.preempted_req_ids == plain.preempted_req_ids
        queues = [
            ([r.request_id for r in s.running], [r.request_id for r in s.waiting])
            for s in self.both
        ]
        assert queues[0] == queues[1]
        new = [
            [(request.req_id, request.num_computed_tokens) for request in output.scheduled_new_reqs]
            for output in (ours, plain)
        ]
        assert new[0] == new[1], "prefix hits"

    def check_rows(self, waited: bool) -> None:
        """Whoever holds more blocks than the twin holds the next of its chunk, and nobody waits."""
        ahead = 0
        for name in self.ours.requests:
            for blocks, twin in zip(tables(self.ours, name), tables(self.plain, name), strict=True):
                needed = len(twin)
                assert len(blocks) >= needed
                for last, block in zip(blocks[needed - 1 :], blocks[needed:], strict=False):
                    assert block == last + 1
                    assert (block - 1) // (R // BLOCK) == (last - 1) // (R // BLOCK)
                ahead += len(blocks) - needed
        free = [s.kv_cache_manager.block_pool.get_num_free_blocks() for s in self.both]
        assert free[0] + ahead == free[1]
        if waited:
            assert not ahead


def prefixes(scheduler) -> set:
    return set(scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache)


prompts = st.tuples(st.integers(0, FAMILIES - 1), st.integers(1, 120)).map(
    lambda p: [p[0] * 100 + i // 3 for i in range(p[1])]
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), prompts, st.integers(0, 2)),
        st.tuples(st.just("step"), st.lists(st.integers(0, 4), min_size=5, max_size=5)),
        st.tuples(st.just("steps"), st.integers(1, 12), st.integers(0, 4)),
        st.tuples(st.just("abort"), st.integers(0, 8)),
    ),
    max_size=25,
)


@given(
    num_blocks=st.integers(14, 60),
    kind=st.sampled_from(sorted(KINDS)),
    method=st.sampled_from(["ngram", "draft_model"]),
    length=st.sampled_from(["fixed", "auto"]),
    policy=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
    operations=operations,
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_drafts_disturb_nobody(
    num_blocks, kind, method, length, policy, caching, operations
) -> None:
    """Over any pattern of arrivals, aborts and acceptance."""
    twins = Twins(num_blocks, kind, method, length, policy, caching)
    for operation, *arguments in operations:
        if operation == "add":
            twins.add(*arguments)
        elif operation == "abort":
            if twins.ours.requests:
                names = sorted(twins.ours.requests)
                twins.abort(names[arguments[0] % len(names)])
        elif operation == "step":
            twins.step(iter(arguments[0]))
        else:
            for _ in range(arguments[0]):
                twins.step(iter([arguments[1]] * 5))


def test_drafts_take_the_rows_that_are_held() -> None:
    """A request with a foreign block behind its own: drafts end where its block does."""
    scheduler = make_scheduler(60, most=8, bmc={"r": BLOCK})
    add(scheduler, "a", range(BLOCK - 5))
    step(scheduler)
    seen = []
    for _ in range(8):
        rows = scheduler.requests["a"].num_tokens
        output = step(scheduler, none)
        seen.append((rows, drafts_of(output).get("a", 0)))
        assert len(table(scheduler, "a")) == cdiv(rows, BLOCK)
    assert seen == [(12, 4), (13, 3), (14, 2), (15, 1), (16, 0), (17, 8), (18, 8), (19, 8)]
    assert scheduler.drafts.stats().growths == 0


def test_a_growth_for_drafts_takes_the_next_block_of_the_chunk() -> None:
    scheduler = make_scheduler(60, most=8)
    add(scheduler, "a", range(BLOCK - 5))
    step(scheduler)
    (first,) = table(scheduler, "a")
    assert drafts_of(step(scheduler, none)) == {"a": 8}
    assert table(scheduler, "a") == [first, first + 1]
    stats = scheduler.drafts.stats()
    assert (stats.growths, stats.rows_offered, stats.rows_used) == (1, 8, 8)
    assert stats.lengths[8] == 1
    step(scheduler, none)
    assert scheduler.drafts.stats().growths == 1, "it holds the block already"


def test_a_cached_prefix_is_not_evicted_for_drafts() -> None:
    scheduler = make_scheduler(1 + 2 * R // BLOCK, most=8)
    add(scheduler, "old", range(2 * R - 2), max_tokens=1)
    while scheduler.requests:
        step(scheduler)
    known = prefixes(scheduler)
    add(scheduler, "a", range(300, 300 + BLOCK - 3))
    step(scheduler)
    known &= prefixes(scheduler)  # The prompt took a block.
    for _ in range(3):
        assert drafts_of(step(scheduler, none)).get("a", 0) <= 2
    assert prefixes(scheduler) >= known


def test_who_waits_gets_the_blocks_of_drafts() -> None:
    """A newcomer that needs every block that is not needed is admitted at once."""
    scheduler = make_scheduler(1 + R // BLOCK, most=8, enable_prefix_caching=False)
    add(scheduler, "a", range(BLOCK - 5))
    step(scheduler)
    step(scheduler, none)
    assert len(table(scheduler, "a")) == 2
    add(scheduler, "b", range(3 * BLOCK))
    output = step(scheduler, none)
    assert [new.req_id for new in output.scheduled_new_reqs] == ["b"]
    assert getattr(output, TAKEN_BACK) == {"a": (1,)}
    assert len(table(scheduler, "a")) == 1
    assert drafts_of(output) == {"a": 3}, "its own rows remain"
    scheduler.check_integrity()


def test_no_drafts_while_the_budget_binds() -> None:
    """A prompt in parts takes the whole budget; then drafts come back."""
    scheduler = make_scheduler(90, **LIMITS)
    add(scheduler, "a", range(20))
    step(scheduler)
    add(scheduler, "b", range(100, 220))
    budget = LIMITS["max_num_batched_tokens"]
    outputs = [step(scheduler, none) for _ in range(4)]
    assert [o.num_scheduled_tokens.get("b") for o in outputs] == [budget - 1, budget - 1, 26, 5]
    assert [drafts_of(o) for o in outputs] == [{}, {}, {"a": 4}, {"a": 4, "b": 4}]


def test_no_drafts_behind_the_last_token() -> None:
    """Nor behind the longest sequence: nobody could accept them."""
    scheduler = make_scheduler(60)
    add(scheduler, "a", range(10), max_tokens=4)
    step(scheduler)
    assert [drafts_of(step(scheduler, none)) for _ in range(3)] == [{"a": 2}, {"a": 1}, {}]
    assert not scheduler.requests
    scheduler = make_scheduler(60, max_model_len=64)
    add(scheduler, "b", range(60))
    step(scheduler)
    assert drafts_of(step(scheduler, none)) == {"b": 2}


@pytest.mark.parametrize("worker", ["auto", "another.Worker"])
def test_fillers_near_the_limit_are_dropped(worker: str) -> None:
    """Within K of the longest sequence vLLM's runner gives everybody K tokens nobody drafted;
    BMC's worker does not."""
    scheduler = make_scheduler(60, max_model_len=64, worker_cls=worker)
    add(scheduler, "a", range(4))
    add(scheduler, "b", range(100, 158))
    verified = []
    for _ in range(5):
        longest = max((r.num_tokens for r in scheduler.requests.values()), default=0)
        verified.append((longest, sum(drafts_of(step(scheduler, none)).values())))
    # With the drafts that it verifies, the step at 59 tokens ends within 4 of 64, and that at 61.
    dropped = [8, 0, 6, 0] if worker != "auto" else [8, 7, 6, 5]
    assert verified == list(zip(range(58, 63), [0, *dropped], strict=True))


def test_the_users_table_is_an_upper_bound() -> None:
    by_batch = {"num_speculative_tokens_per_batch_size": [[1, 1, 3], [2, 8, 1]]}
    scheduler = make_scheduler(60, speculative=by_batch)
    add(scheduler, "a", range(10))
    step(scheduler)
    assert drafts_of(step(scheduler, none)) == {"a": 3}
    add(scheduler, "b", range(10))
    step(scheduler, none)
    assert drafts_of(step(scheduler, none)) == {"a": 1, "b": 1}


def test_a_request_alone_in_a_step_is_not_padded() -> None:
    """vLLM would schedule K dummy drafts for a newcomer of one token."""
    scheduler = make_scheduler(60)
    add(scheduler, "a", range(10))
    step(scheduler)
    add(scheduler, "b", [7])
    assert step(scheduler).num_scheduled_tokens == {"a": 5, "b": 1}


def test_a_draft_model_has_no_rows_of_its_own() -> None:
    """vLLM would hold rows for K drafts at all times."""
    scheduler = make_scheduler(60, "draft_model")
    add(scheduler, "a", range(BLOCK))
    output = step(scheduler)
    assert len(table(scheduler, "a")) == 1
    assert output.num_spec_tokens_to_schedule == 4


def test_what_is_reported_reaches_the_controller() -> None:
    scheduler = make_scheduler(60, "draft_model")
    controller = scheduler.drafts.controller
    calls = []
    controller.set_costs = lambda costs: calls.append(costs)
    controller.observe_step = lambda *step: calls.append(step)
    controller.observe_acceptance = lambda *seen: calls.append(seen)
    controller.forget = lambda name: calls.append(name)
    costs = StepCosts(((1, 1.0),), ((1, 0.0),), ())
    times = StepTimes(1.0, 0.1, 0.1, 4)
    add(scheduler, "a", range(10), max_tokens=4)
    output = scheduler.schedule()
    finish(scheduler, output, {"a": [1]}, **{STEP_COSTS: costs, STEP_TIMES: times})
    assert calls == [costs], "a prompt's times are of another step"
    output = scheduler.schedule()
    assert drafts_of(output) == {"a": 2}
    finish(scheduler, output, {"a": [1, 1]}, **{STEP_TIMES: times})
    assert calls[1:] == [([2], [11], times), ("a", 2, 1, "draft_model")]
    step(scheduler)
    assert calls[-1] == "a"


def test_acceptance_is_of_the_drafter_that_made_the_draft() -> None:
    """Where a configuration has two, the worker names it with each draft."""
    scheduler = make_scheduler(60, "draft_model")
    calls = []
    scheduler.drafts.controller.observe_acceptance = lambda *seen: calls.append(seen)
    for name in "ab":
        add(scheduler, name, range(10))
    step(scheduler)
    drafts = DraftTokenIds(["a", "b"], [[9] * 4, [9] * 2])
    setattr(drafts, DRAFTERS, ["ngram", "draft_model"])
    scheduler.update_draft_token_ids(drafts)
    step(scheduler, lambda name, k: k - 1)
    assert calls == [("a", 4, 3, "ngram"), ("b", 2, 1, "draft_model")]


def test_nothing_is_kept_of_requests_that_ended_with_the_step_of_their_drafts() -> None:
    scheduler = make_scheduler(60, "draft_model")
    for i in range(3):
        add(scheduler, f"{i}", range(10), max_tokens=1)
        step(scheduler)
        drafts = DraftTokenIds([f"{i}"], [[9] * 4])
        setattr(drafts, DRAFTERS, ["ngram"])
        scheduler.update_draft_token_ids(drafts)  # vLLM's order: after the step's output
    assert not scheduler.requests
    assert not scheduler.drafts._drafters


def test_fixed_and_auto_lengths() -> None:
    for setting, fixed in (("fixed", True), ("auto", False)):
        scheduler = make_scheduler(60, bmc={"draft_length": setting})
        assert scheduler.drafts.controller.fixed_length == fixed


def test_without_speculation_there_are_no_drafts() -> None:
    scheduler = make_scheduler(60, None)
    assert scheduler.drafts is None
    assert scheduler.dynamic_sd_lookup is None


def test_what_became_of_drafts_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    scheduler = make_scheduler(60, log_stats=True)
    add(scheduler, "a", range(10), max_tokens=8)
    while scheduler.requests:
        step(scheduler)
    collector = _Collector()
    collector.instances.append(scheduler.vllm_config.instance_id)
    found = {
        sample.name + sample.labels.get("k", ""): sample.value
        for family in collector.collect()
        for sample in family.samples
    }
    # A token with the prompt, 4 drafts and a token, and of the last two one is drafted: in row 17.
    assert found["bmc:spec_decode_rows_used_total"] == 5
    assert found["bmc:spec_decode_rows_offered_total"] == 5
    assert found["bmc:spec_decode_lengths_total4"] == 1
    assert found["bmc:spec_decode_lengths_total1"] == 1
    assert found["bmc:spec_decode_growths_total"] == 1
