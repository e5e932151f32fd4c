"""The block managers alone, on vLLM's real KVCacheManager and beside its own, without an engine."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from tests.support.managers import (
    BLOCK,
    KINDS,
    MAX_MODEL_LEN,
    add_request,
    growth_of,
    held,
    make_manager,
    verify,
)


class Simulation:
    """What a scheduler does to a KVCacheManager, one request at a time."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.running: list[Request] = []
        self.count = 0

    def start(self, prompt: list[int]) -> None:
        self.running.append(add_request(self.manager, f"r{self.count}", prompt))
        self.count += 1

    def step(self, request: Request, chunk: int) -> None:
        """Schedules up to ``chunk`` tokens; preempts the newest request when there is no room."""
        new = self.manager.get_computed_blocks(request) if not request.num_computed_tokens else None
        hit = new[1] if new else 0
        tokens = min(chunk, request.num_tokens - request.num_computed_tokens - hit)
        if tokens <= 0 or request.num_tokens > MAX_MODEL_LEN:
            return
        if self.manager.allocate_slots(request, tokens, hit, new[0] if new else None) is None:
            self.preempt(self.running[-1])
            return
        request.num_computed_tokens += hit + tokens
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(request.num_tokens % 7)

    def preempt(self, request: Request) -> None:
        self.manager.free(request)
        request.num_computed_tokens = 0

    def finish(self, request: Request) -> None:
        self.manager.free(request)
        self.running.remove(request)

    def do(self, operation: str, argument) -> None:
        if operation == "start":
            self.start(argument)
        elif operation == "step all":
            for request in list(self.running):
                self.step(request, argument)
        elif operation == "reset":
            self.manager.reset_prefix_cache()
        elif self.running:
            index = argument[0] if operation == "step" else argument
            request = self.running[index % len(self.running)]
            if operation == "step":
                self.step(request, argument[1])
            else:
                getattr(self, operation)(request)

    def picture(self) -> tuple:
        """What a scheduler sees: free blocks, and blocks and tokens of each request."""
        groups = range(len(self.manager.coordinator.single_type_managers))
        return self.manager.block_pool.get_num_free_blocks(), [
            (
                request.request_id,
                request.num_computed_tokens,
                [[i == 0 for i in held(self.manager, request, group)] for group in groups],
            )
            for request in self.running
        ]


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
any_pool = given(
    kind=st.sampled_from(sorted(KINDS)),
    num_blocks=st.integers(15, 90),
    r=st.sampled_from([16, 32, 64, 256]),
    operations=operations,
)
ENOUGH = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@any_pool
@ENOUGH
def test_any_sequence_keeps_the_pool_whole(kind, num_blocks, r, operations) -> None:
    manager = make_manager(kind, num_blocks, r)
    simulation = Simulation(manager)
    for operation, argument in operations:
        simulation.do(operation, argument)
        verify(manager)
        stats = growth_of(manager).stats()
        assert 0 <= stats.rows_spare <= stats.rows_reserved
    for request in list(simulation.running):
        simulation.finish(request)
    verify(manager)
    assert manager.block_pool.get_num_free_blocks() == num_blocks - 1
    assert growth_of(manager).stats()[1:] == (0, 0)


@any_pool
@ENOUGH
def test_the_pool_is_as_full_as_vllms_own(kind, num_blocks, r, operations) -> None:
    """The same requests are admitted, refused and preempted, and hold as many blocks.

    Without prefix caching: with it other blocks are evicted, and the hits may differ.
    """
    ours = Simulation(make_manager(kind, num_blocks, r, caching=False))
    theirs = Simulation(make_manager(kind, num_blocks, None, caching=False))
    for operation, argument in operations:
        ours.do(operation, argument)
        theirs.do(operation, argument)
        assert ours.picture() == theirs.picture()


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_growth_takes_adjacent_chunks(kind: str) -> None:
    manager = make_manager(kind, 60, r=64)
    request = add_request(manager, "a", list(range(70)))
    other = add_request(manager, "b", list(range(1000, 1010)))
    manager.allocate_slots(request, 70)
    manager.allocate_slots(other, 10)
    blocks = held(manager, request)
    assert blocks == list(range(blocks[0], blocks[0] + 5)), "70 rows: five blocks, side by side"
    stats = growth_of(manager).stats()
    assert stats.growths == 2
    assert stats.rows_reserved == 2 * 64 + 64, "two chunks and one"
    request.num_computed_tokens = other.num_computed_tokens = 10
    request.num_computed_tokens = 70
    assert growth_of(manager).stats().rows_spare == 2 * 64 - 70 + 64 - 10
    for _ in range(58):
        request.append_output_token_ids(1)
        manager.allocate_slots(request, 1)
        request.num_computed_tokens += 1
    after = held(manager, request)
    assert after[5:] == [blocks[4] + 1, blocks[4] + 2, blocks[4] + 3], "into its second chunk"
    assert growth_of(manager).stats().growths == 2
    request.append_output_token_ids(1)
    manager.allocate_slots(request, 1)
    assert growth_of(manager).stats().growths == 3
    assert held(manager, request)[8] not in held(manager, other)
    verify(manager)


def test_a_prompt_in_parts_lies_in_one_stretch() -> None:
    """Others grow between the parts of a long prompt."""
    manager = make_manager("full", 60, r=64)
    long = add_request(manager, "long", list(range(160)))
    others = [add_request(manager, f"o{i}", list(range(1000 * i, 1000 * i + 30))) for i in (1, 2)]
    for part in range(5):
        manager.allocate_slots(long, 32)
        long.num_computed_tokens += 32
        if part < 2:
            manager.allocate_slots(others[part], 30)
    blocks = held(manager, long)
    assert blocks == list(range(blocks[0], blocks[0] + 10))
    verify(manager)


def test_a_window_keeps_no_room_that_it_never_holds() -> None:
    """Of a prompt of 190 rows it holds at most 40, those of a step, and a block at each end."""
    manager = make_manager("sliding", 60, r=32)
    request = add_request(manager, "a", list(range(190)))
    assert manager.allocate_slots(request, 16) is not None
    assert growth_of(manager).stats().rows_reserved <= 40 + 64 + 2 * BLOCK
    verify(manager)


def test_a_growth_evicts_the_prefix_that_is_next_to_go() -> None:
    manager = make_manager("full", 25, r=64)
    for name in ("old", "new"):
        request = add_request(manager, name, list(range(len(name + "x" * (name == "new")), 190)))
        manager.allocate_slots(request, len(request.prompt_token_ids))
        manager.free(request)
    third = add_request(manager, "third", list(range(5000, 5040)))
    manager.allocate_slots(third, 40)
    verify(manager)
    again = add_request(manager, "again", list(range(4, 190)))
    assert manager.get_computed_blocks(again)[1] == 176, "the younger prefix is whole"


def test_spare_rows_refuse_nobody() -> None:
    """Requests of one block each, r of four: as many as there are blocks."""
    manager = make_manager("full", 41, r=64, caching=False)
    for i in range(40):
        assert manager.allocate_slots(add_request(manager, f"r{i}", [1] * 10), 10) is not None
    assert manager.allocate_slots(add_request(manager, "late", [1] * 10), 10) is None
    verify(manager)


def test_a_block_table_holds_what_is_needed() -> None:
    manager = make_manager("full", 60, r=256)
    request = add_request(manager, "a", list(range(150)))
    manager.allocate_slots(request, 150)
    assert len(held(manager, request)) == -(-150 // BLOCK)
