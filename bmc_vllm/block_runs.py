"""Taking chosen free blocks from vLLM's BlockPool.

Promises: only free blocks that hold no cached prefix are taken here, at a cost that does not
depend on the size of the pool. Adjacency is best effort; nothing depends on it for correctness.
Knows nothing of requests, rows or growth.

vLLM's free queue keeps blocks without a hash in front of cached ones: freed blocks without a hash
are put at its head, cached ones at its tail. So when its head is a cached block, no better block
is worth a search.
"""

from __future__ import annotations

from itertools import islice

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

PROBES = 8
"""Free blocks at the head of the queue from which an adjacent run is tried."""


def is_fresh(pool: BlockPool, block: KVCacheBlock) -> bool:
    """Whether the block is free and nobody would miss its contents."""
    return (
        block.ref_cnt == 0
        and not block.is_null
        and block.block_hash is None
        and block.block_id not in pool.cached_block_hashes_by_block
        and block.block_id not in pool._reuse_watchers
    )


def _fresh_run(pool: BlockPool, start: int, count: int) -> list[KVCacheBlock] | None:
    if start < 1 or start + count > len(pool.blocks):
        return None
    run = pool.blocks[start : start + count]
    return run if all(is_fresh(pool, block) for block in run) else None


def find_run(pool: BlockPool, count: int, after: int | None) -> list[KVCacheBlock] | None:
    """``count`` adjacent fresh blocks; looks behind block ``after`` first. None if not found."""
    if after is not None and (run := _fresh_run(pool, after + 1, count)):
        return run
    for block in islice(pool.free_block_queue.iter_blocks_after(None), PROBES):
        if not is_fresh(pool, block):
            break
        # A finished request's last block comes first in the queue, so both directions are tried.
        run = _fresh_run(pool, block.block_id, count) or _fresh_run(
            pool, block.block_id - count + 1, count
        )
        if run:
            return run
    return None


def take(pool: BlockPool, blocks: list[KVCacheBlock]) -> None:
    """Takes the fresh ``blocks`` out of the free queue, as ``get_new_blocks`` would."""
    for block in blocks:
        pool.free_block_queue.remove(block)
        block.ref_cnt += 1
        if pool.metrics_collector:
            pool.metrics_collector.on_block_allocated(block)


def take_chunks(
    pool: BlockPool, needed: int, spare: int, chunk: int, after: int | None
) -> list[KVCacheBlock]:
    """Takes ``needed`` blocks and up to ``spare`` more, in adjacent runs where there are some.

    Args:
        needed: blocks that must be taken; cached blocks are evicted for them as vLLM would.
        spare: blocks that are taken only if they are fresh.
        chunk: length of the runs that are looked for when there is no run of the whole length.
        after: id of the block behind which a run is tried first.

    Raises:
        ValueError: fewer than ``needed`` blocks are free.
    """
    taken: list[KVCacheBlock] = []
    total = needed + spare
    length = total
    while len(taken) < total:
        length = min(length, total - len(taken))
        run = find_run(pool, length, after) if length > 1 else None
        if run is None:
            if length > chunk:
                length = chunk
                continue
            break
        take(pool, run)
        taken += run
        after = run[-1].block_id
    if len(taken) < needed:
        taken += pool.get_new_blocks(needed - len(taken))
    while len(taken) < total:
        head = next(pool.free_block_queue.iter_blocks_after(None), None)
        if head is None or not is_fresh(pool, head):
            break
        take(pool, [head])
        taken.append(head)
    return taken
