"""Which free blocks are taken, and in which order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool

from bmc_vllm.free_chunks import SINGLES_DIVISOR, ChunkedFreeQueue, Place
from tests.support.managers import BLOCK

CHUNK = 4


def pool_of(num_chunks: int, caching: bool = True) -> BlockPool:
    """Block 0 is the null block, the chunks are 1..4, 5..8, and so on; all were never used."""
    pool = BlockPool(num_chunks * CHUNK + 1, enable_caching=caching, hash_block_size=BLOCK)
    pool.free_block_queue = ChunkedFreeQueue(pool.free_block_queue, pool.blocks, CHUNK)
    return pool


def take(pool: BlockPool, n: int, owner="a", after: int | None = None, room: int = 0) -> list[int]:
    with pool.free_block_queue.placing(Place(owner, after, max(n, room))):
        blocks = pool.get_new_blocks(n)
    pool.free_block_queue.check()
    return [block.block_id for block in blocks]


def free(pool: BlockPool, ids, cached: bool = True) -> None:
    """As vLLM frees a request: its last block first."""
    for i in ids:
        if cached:
            pool.blocks[i].set_block_hash(b"%d" % i)
    pool.free_blocks([pool.blocks[i] for i in reversed(ids)])
    pool.free_block_queue.check()


def test_a_request_grows_behind_its_last_block() -> None:
    pool = pool_of(6)
    assert take(pool, 2, "a") == [1, 2]
    assert take(pool, 1, "b") == [5], "the rest of a's chunk is passed by"
    assert take(pool, 1, "a", after=2) == [3]
    assert pool.free_block_queue.num_spare("a", 3) == 1
    assert take(pool, 3, "a", after=3) == [4, 9, 10], "the chunk behind is b's"
    assert pool.free_block_queue.growths == 3


def test_free_blocks_behind_a_block_end_with_its_chunk() -> None:
    pool = pool_of(3)
    queue = pool.free_block_queue
    take(pool, 2, "a", room=8)
    assert queue.free_behind(2) == range(3, 5), "not the chunk that is kept for the rest"
    pool.free_block_queue.remove(pool.blocks[4])
    assert queue.free_behind(2) == range(3, 4)
    assert len(queue.free_behind(4)) == 0


def test_the_rest_of_a_prompt_is_kept() -> None:
    pool = pool_of(6)
    queue = pool.free_block_queue
    assert take(pool, 3, "a", room=10) == [1, 2, 3]
    assert queue.num_spare("a", 3) == 1 + 2 * CHUNK
    assert take(pool, 1, "b") == [13]
    assert take(pool, 7, "a", after=3) == [4, 5, 6, 7, 8, 9, 10]
    assert queue.num_spare("a", 10) == 2
    assert take(pool, 5, "c", room=12) == [17, 18, 19, 20, 21]
    queue.release("c", 21)
    assert queue.num_spare("c", 21) == 3


def test_what_is_kept_is_free() -> None:
    pool = pool_of(3)
    queue = pool.free_block_queue
    take(pool, 1, "a", room=12)
    assert pool.get_num_free_blocks() == 11
    assert sorted(take(pool, 11, "b")) == list(range(2, 13)), "in need, everything"
    assert queue.num_spare("a", 1) == 0
    with pytest.raises(ValueError, match="12 free blocks"):
        pool.get_new_blocks(12)


def test_the_oldest_prefix_goes_first() -> None:
    pool = pool_of(4)
    first, second = take(pool, 8, "a"), take(pool, 8, "b")
    free(pool, second)
    free(pool, first)
    assert take(pool, 1, "c") == [13], "b's tail"
    assert take(pool, 1, "d") == [9]
    assert pool.blocks[1].block_hash is not None


def test_blocks_that_hold_nothing_go_before_prefixes() -> None:
    pool = pool_of(4)
    first, second = take(pool, 8, "a"), take(pool, 8, "b")
    free(pool, first)
    free(pool, second, cached=False)
    assert take(pool, 2, "c")[0] > 8


def test_a_young_neighbour_is_spared() -> None:
    """A prompt takes a stretch of chunks only as far as all of them are about to go."""
    pool = pool_of(40)
    requests = [take(pool, 4 * CHUNK, str(i)) for i in range(10)]
    for i in (3, 4, *[i for i in range(10) if i not in (3, 4, 2)], 2):
        free(pool, requests[i])
    # 3 is the oldest, 2 (in front of it) the youngest, 4 (behind it) the next.
    found = take(pool, 6 * CHUNK, "new")
    assert set(found) <= {*requests[3], *requests[4]}


def test_a_prefix_that_was_found_again_is_spared_once() -> None:
    pool = pool_of(20)
    requests = [take(pool, CHUNK, str(i)) for i in range(20)]
    found = [pool.blocks[i] for i in requests[0]]
    free(pool, requests[0])
    pool.touch(found)
    pool.free_blocks(found[::-1])
    for blocks in requests[1:]:
        free(pool, blocks)
    # The oldest of all, but it goes last.
    assert not set(take(pool, 19 * CHUNK, "a")) & set(requests[0])
    assert take(pool, CHUNK, "b") == requests[0]


def test_no_young_prefix_goes_because_it_lies_behind_a_chunk() -> None:
    pool = pool_of(40)
    requests = [take(pool, CHUNK, str(i)) for i in range(40)]
    young = range(1, 5)
    for i in (*range(5, 40), *young):
        free(pool, requests[i])
    (block,) = take(pool, 1, "0", after=requests[0][-1])
    assert not any(block in requests[i] for i in young)


def test_a_growth_takes_what_an_ended_request_left_of_its_chunk() -> None:
    pool = pool_of(8)
    blocks = take(pool, 1, "a")
    take(pool, 1, "b")
    pool.free_block_queue.release("a", blocks[-1])
    free(pool, blocks)
    assert take(pool, 1, "c") == [2]
    assert take(pool, 2, "c", after=2) == [3, 4]


def test_a_chunk_without_prefixes_is_taken_from_its_beginning() -> None:
    pool = pool_of(8, caching=False)
    blocks = take(pool, 1, "a")
    pool.free_block_queue.release("a", blocks[-1])
    free(pool, blocks, cached=False)
    assert take(pool, 1, "b") == [1], "not from where a had ended"
    assert pool.free_block_queue.num_spare("b", 1) == 3


def test_what_an_ended_request_left_is_its_successors() -> None:
    """Whoever found its prefix, and goes on where it ended, has the rest of the chunk."""
    pool = pool_of(8)
    blocks = take(pool, 2, "a")
    pool.free_block_queue.release("a", blocks[-1])
    free(pool, blocks)
    pool.touch([pool.blocks[blocks[0]]])
    assert take(pool, 1, "b", after=blocks[0]) == [2]
    assert take(pool, 1, "c") == [5]
    assert take(pool, 2, "b", after=2) == [3, 4]


def test_single_blocks_are_used_up_when_they_are_many() -> None:
    pool = pool_of(8)
    assert [take(pool, 1, str(i))[0] for i in range(3)] == [1, 5, 9]
    # 9 of 29 free blocks lie beside a used one: more than a quarter.
    assert pool.get_num_free_blocks() // SINGLES_DIVISOR < 9
    assert take(pool, 1, "new") == [2]
    assert take(pool, CHUNK, "prompt") == [13, 14, 15, 16], "a prompt gets a chunk all the same"


def test_without_a_place_the_queue_is_vllms() -> None:
    ours, theirs = pool_of(5), BlockPool(5 * CHUNK + 1, enable_caching=True, hash_block_size=BLOCK)
    for count in (1, 3, 5, 2):
        blocks = [pool.get_new_blocks(count) for pool in (ours, theirs)]
        assert [b.block_id for b in blocks[0]] == [b.block_id for b in blocks[1]]
        for pool, taken in zip((ours, theirs), blocks, strict=True):
            pool.free_blocks(taken[::2])
    ours.free_block_queue.check()


def test_the_last_used_memory_is_used_first_without_prefix_caching() -> None:
    """So that memory which was never touched stays so."""
    pool = pool_of(20, caching=False)
    first = take(pool, 10, "a")
    free(pool, first, cached=False)
    assert set(take(pool, 10, "b")) <= {*range(1, 13)}


@given(
    operations=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 20), st.booleans()),
        max_size=60,
    ),
    caching=st.booleans(),
    num_chunks=st.integers(3, 12),
    size=st.integers(1, 5),
)
def test_chunks_and_links_agree(operations, caching, num_chunks, size) -> None:
    """Owners take, give back, keep; others pop the head: nothing is lost, nothing held twice."""
    pool = BlockPool(num_chunks * size + 2, enable_caching=caching, hash_block_size=BLOCK)
    queue = pool.free_block_queue = ChunkedFreeQueue(pool.free_block_queue, pool.blocks, size)
    queue.remember_discarded()
    owned: dict[int, list] = {}
    for owner, n, room, give in operations:
        blocks = owned.setdefault(owner, [])
        if give:
            for block in blocks[::3]:
                block.set_block_hash(b"%d" % block.block_id) if block.block_hash is None else None
            queue.release(owner, blocks[-1].block_id if blocks else None)
            pool.free_blocks(blocks[::-1])
            owned[owner] = []
        elif n <= pool.get_num_free_blocks():
            if owner:
                after = blocks[-1].block_id if blocks else None
                with queue.placing(Place(owner, after, max(n, room))):
                    blocks += pool.get_new_blocks(n)
            else:
                blocks += pool.get_new_blocks(n)
        queue.check()
        used = [block.block_id for blocks in owned.values() for block in blocks]
        assert len(set(used)) == len(used) == num_chunks * size + 1 - queue.num_free_blocks
        assert all(pool.blocks[i].ref_cnt == 1 for i in used)
        assert not {i for run in queue.take_discarded() for i in run} & set(used)
