"""Which free blocks are taken, and in which order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool

from bmc_vllm.block_runs import PROBES, find_run, is_fresh, take, take_chunks
from tests.support.managers import BLOCK


def pool_of(num_blocks: int) -> BlockPool:
    """Block 0 is the null block; the others are free, in order, and were never used."""
    return BlockPool(num_gpu_blocks=num_blocks, enable_caching=True, hash_block_size=BLOCK)


def ids(blocks) -> list[int] | None:
    return None if blocks is None else [block.block_id for block in blocks]


def use(pool: BlockPool, *block_ids: int) -> None:
    take(pool, [pool.blocks[block_id] for block_id in block_ids])


def test_a_run_behind_the_last_block_comes_first() -> None:
    pool = pool_of(20)
    assert ids(find_run(pool, 4, after=9)) == [10, 11, 12, 13]
    assert ids(find_run(pool, 4, after=None)) == [1, 2, 3, 4]
    use(pool, 11)
    assert ids(find_run(pool, 4, after=9)) == [1, 2, 3, 4], "the head of the queue"
    assert find_run(pool, 11, after=None) is None
    assert ids(find_run(pool, 4, after=17)) == [1, 2, 3, 4], "the pool ends behind 19"


def test_the_run_may_end_at_a_free_block() -> None:
    """A finished request's blocks are freed from its last one on."""
    pool = pool_of(20)
    use(pool, *range(1, 20))
    pool.free_blocks([pool.blocks[i] for i in (8, 7, 6, 5)])
    assert ids(find_run(pool, 4, after=None)) == [5, 6, 7, 8]


def test_the_search_ends_after_a_few_blocks() -> None:
    pool = pool_of(200)
    use(pool, *range(2, 4 * PROBES, 2))  # single holes at the head of the queue
    assert find_run(pool, 2, after=None) is None
    assert ids(find_run(pool, 2, after=4 * PROBES)) == [4 * PROBES + 1, 4 * PROBES + 2]


def test_needed_blocks_are_taken_wherever_they_are() -> None:
    pool = pool_of(12)
    use(pool, 2, 4, 6, 8, 10)
    assert sorted(ids(take_chunks(pool, 6, 0, 4, None)) or ()) == [1, 3, 5, 7, 9, 11]
    with pytest.raises(ValueError, match="free"):
        take_chunks(pool, 1, 0, 4, None)


@given(
    used=st.sets(st.integers(1, 39), max_size=30),
    needed=st.integers(0, 12),
    spare=st.integers(0, 12),
    chunk=st.integers(1, 8),
    after=st.none() | st.integers(1, 39),
)
def test_what_is_taken_was_fresh_and_is_owned(used, needed, spare, chunk, after) -> None:
    pool = pool_of(40)
    use(pool, *used)
    free = {block.block_id for block in pool.blocks if is_fresh(pool, block)}
    assert free == set(range(1, 40)) - used
    if needed > len(free):
        with pytest.raises(ValueError, match="free"):
            take_chunks(pool, needed, spare, chunk, after)
        return
    taken = ids(take_chunks(pool, needed, spare, chunk, after))
    assert taken is not None
    assert len(set(taken)) == len(taken) == min(needed + spare, len(free))
    assert set(taken) <= free
    assert all(pool.blocks[i].ref_cnt == 1 for i in taken)
    assert pool.get_num_free_blocks() == len(free) - len(taken)
