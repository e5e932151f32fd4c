"""The block managers alone, on vLLM's real KVCacheManager, without an engine."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from tests.support.managers import (
    BLOCK,
    KINDS,
    MAX_MODEL_LEN,
    held,
    make_manager,
    make_request,
    verify,
)


class Simulation:
    """What a scheduler does to a KVCacheManager, one request at a time."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.running: list[Request] = []
        self.count = 0

    def start(self, prompt: list[int]) -> None:
        request = make_request(f"r{self.count}", prompt)
        self.count += 1
        self.running.append(request)

    def step(self, request: Request, chunk: int) -> None:
        """Schedules up to ``chunk`` tokens; preempts the newest request when there is no room."""
        new = self.manager.get_computed_blocks(request) if not request.num_computed_tokens else None
        hit = new[1] if new else 0
        tokens = min(chunk, request.num_tokens - request.num_computed_tokens - hit)
        if tokens <= 0 or request.num_tokens > MAX_MODEL_LEN:
            return
        needed = self.needed(request, hit, new[0] if new else None, tokens)
        free = self.manager.block_pool.get_num_free_blocks()
        blocks = self.manager.allocate_slots(request, tokens, hit, new[0] if new else None)
        # The promise: refused exactly when vLLM's own count of needed blocks does not fit.
        assert (blocks is None) == (needed > free)
        if blocks is None:
            self.preempt(self.running[-1])
            return
        request.num_computed_tokens += hit + tokens
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(request.num_tokens % 7)

    def needed(self, request: Request, hit: int, computed, tokens: int) -> int:
        total = request.num_computed_tokens + hit
        self.manager.coordinator.remove_skipped_blocks(request.request_id, total)
        lists = computed.blocks if computed else self.manager.empty_kv_cache_blocks.blocks
        return self.manager.coordinator.get_num_blocks_to_allocate(
            request.request_id,
            min(total + tokens, MAX_MODEL_LEN),
            lists,
            0,
            total,
            total,
            total + tokens,
        )

    def preempt(self, request: Request) -> None:
        self.manager.free(request)
        request.num_computed_tokens = 0

    def finish(self, request: Request) -> None:
        self.manager.free(request)
        self.running.remove(request)


prompts = st.tuples(st.integers(0, 2), st.integers(1, 150)).map(
    # Three families of prompts, so that prefixes are shared often.
    lambda p: [p[0] * 1000 + i // 3 for i in range(p[1])]
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("start"), prompts),
        st.tuples(st.just("step"), st.tuples(st.integers(0, 5), st.integers(1, 64))),
        st.tuples(st.just("step all"), st.integers(1, 64)),
        st.tuples(st.just("finish"), st.integers(0, 5)),
        st.tuples(st.just("preempt"), st.integers(0, 5)),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=40,
)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    num_blocks=st.integers(15, 90),
    r=st.sampled_from([16, 32, 64, 256]),
    caching=st.booleans(),
    operations=operations,
)
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_sequence_keeps_the_pool_whole(kind, num_blocks, r, caching, operations) -> None:
    manager, growth = make_manager(kind, num_blocks, r, caching)
    simulation = Simulation(manager)
    for operation, argument in operations:
        running = simulation.running
        if operation == "start":
            simulation.start(argument)
        elif operation == "step all":
            for request in list(running):
                simulation.step(request, argument)
                verify(manager)
        elif operation == "reset":
            manager.reset_prefix_cache()
        elif running:
            index = argument[0] if operation == "step" else argument
            request = running[index % len(running)]
            if operation == "step":
                simulation.step(request, argument[1])
            else:
                getattr(simulation, operation)(request)
        verify(manager)
        stats = growth.stats()
        assert 0 <= stats.rows_spare <= stats.rows_reserved or stats.rows_reserved == 0
    for request in list(simulation.running):
        simulation.finish(request)
    verify(manager)
    assert manager.block_pool.get_num_free_blocks() == num_blocks - 1
    assert growth.stats()[1:] == (0, 0)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_growth_takes_adjacent_chunks(kind: str) -> None:
    manager, growth = make_manager(kind, 60, r=64)
    request = make_request("a", list(range(70)))
    manager.allocate_slots(request, 70)
    blocks = held(manager, request)
    # 70 rows: two growths of 64, taken at once.
    assert len(blocks) == 8
    assert blocks == list(range(blocks[0], blocks[0] + 8))
    assert growth.stats() == (1, 128, 58)
    request.num_computed_tokens = 70
    for _ in range(58):
        request.append_output_token_ids(1)
        assert manager.allocate_slots(request, 1).get_block_ids(allow_none=True) is None
        request.num_computed_tokens += 1
    assert growth.stats().growths == 1
    request.append_output_token_ids(1)
    manager.allocate_slots(request, 1)
    after = held(manager, request)
    assert len(after) == 12
    assert after[8:] == list(range(after[7] + 1, after[7] + 5))
    assert growth.stats().growths == 2
    verify(manager)


def test_spare_blocks_are_not_cached() -> None:
    manager, _ = make_manager("full", 60, r=64)
    request = make_request("a", list(range(70)))
    manager.allocate_slots(request, 70)
    hashed = [b.block_hash is not None for b in manager.coordinator.get_blocks("a")[0]]
    assert hashed == [True] * 4 + [False] * 4


def test_spare_blocks_never_evict_a_cached_prefix() -> None:
    manager, _ = make_manager("full", 25, r=64)
    first = make_request("a", list(range(160)))
    manager.allocate_slots(first, 160)
    manager.free(first)
    second = make_request("b", list(range(1000, 1150)))
    manager.allocate_slots(second, 150)
    # 24 blocks: 10 cached ones of a, 14 fresh ones; b needs 10 and gets fresh ones only.
    again = make_request("c", list(range(160)))
    assert manager.get_computed_blocks(again)[1] == 144
    verify(manager)


def test_nearly_full_pool_grows_by_need() -> None:
    manager, _ = make_manager("full", 14, r=64)
    first = make_request("a", list(range(150)))
    manager.allocate_slots(first, 150)
    second = make_request("b", list(range(1000, 1010)))
    # 13 blocks, 10 or more taken: b's one block is there, its chunk of four is not.
    assert manager.allocate_slots(second, 10) is not None
    assert len(held(manager, second)) <= 2
    verify(manager)


def test_block_table_never_overflows() -> None:
    manager, _ = make_manager("full", 60, r=256)
    request = make_request("a", list(range(150)))
    manager.allocate_slots(request, 150)
    assert len(held(manager, request)) == -(-MAX_MODEL_LEN // BLOCK)
