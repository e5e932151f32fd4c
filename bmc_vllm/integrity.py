"""A full check of vLLM's block pool against the block tables of its managers.

Promises: ``check_integrity`` returns only if no block is owned twice by mistake, none is leaked,
reference counts equal the number of owners, and the free queue and the prefix cache agree with
them. It visits every block: for tests and debugging, not for each step of a server. Knows nothing
of growth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager


class IntegrityError(AssertionError):
    """The block pool and the block tables contradict each other."""


def check_integrity(
    pool: BlockPool,
    managers: Sequence[SingleTypeKVCacheManager],
    retained: Iterable[KVCacheBlock] = (),
) -> None:
    """Raises IntegrityError with every contradiction found.

    Args:
        pool: the pool that all ``managers`` take from.
        managers: all of them.
        retained: blocks that someone else holds one reference each to (frees that are deferred).
    """
    faults: list[str] = []
    owners: Counter[int] = Counter(block.block_id for block in retained if not block.is_null)
    group_of: dict[int, int] = {}
    for manager in managers:
        _count_owners(manager, owners, group_of, faults)
    free = _free_ids(pool, faults)
    for block in pool.blocks:
        if block.is_null:
            continue
        block_id, count = block.block_id, owners[block.block_id]
        if block.ref_cnt != count:
            faults.append(f"block {block_id}: ref_cnt {block.ref_cnt}, {count} owners")
        if count and block_id in free:
            faults.append(f"block {block_id}: free and owned by {count}")
        if not count and block_id not in free:
            faults.append(f"block {block_id}: leaked (no owner, not free)")
    _check_prefix_cache(pool, faults)
    if faults:
        raise IntegrityError("; ".join(faults[:20]))


def _count_owners(
    manager: SingleTypeKVCacheManager,
    owners: Counter[int],
    group_of: dict[int, int],
    faults: list[str],
) -> None:
    group = manager.kv_cache_group_id
    for request_id, blocks in manager.req_to_blocks.items():
        ids = [block.block_id for block in blocks if not block.is_null]
        if len(set(ids)) != len(ids):
            faults.append(f"request {request_id}, group {group}: a block stands twice in {ids}")
        for block_id in ids:
            owners[block_id] += 1
            if group_of.setdefault(block_id, group) != group:
                faults.append(f"block {block_id}: in groups {group_of[block_id]} and {group}")
    # Both ends of a copy that is still to run are held, and the source of a redirected block.
    for pair in manager._pending_cow_copies:
        owners.update(block.block_id for block in pair)


def _free_ids(pool: BlockPool, faults: list[str]) -> set[int]:
    free: set[int] = set()
    for block in pool.free_block_queue.iter_blocks_after(None):
        if block.block_id in free:
            faults.append(f"block {block.block_id}: twice in the free queue")
            break
        free.add(block.block_id)
        if block.is_null:
            faults.append("the null block is in the free queue")
    if len(free) != pool.get_num_free_blocks():
        faults.append(
            f"free queue: {len(free)} blocks linked, {pool.get_num_free_blocks()} counted"
        )
    return free


def _check_prefix_cache(pool: BlockPool, faults: list[str]) -> None:
    for key, entry in pool.cached_block_hash_to_block._cache.items():
        cached = entry.values() if isinstance(entry, dict) else [entry]
        for block in cached:
            others = pool.cached_block_hashes_by_block.get(block.block_id, ())
            if block.block_hash != key and key not in others:
                faults.append(f"block {block.block_id}: cached under a hash it does not carry")
    for block in pool.blocks:
        if block.block_hash is not None and not pool.cached_block_hash_to_block.contain(
            block.block_hash, block.block_id
        ):
            faults.append(f"block {block.block_id}: carries a hash that is not cached")
