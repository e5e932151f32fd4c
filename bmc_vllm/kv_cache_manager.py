"""Block managers whose requests grow ``r`` rows at a time.

Promises vLLM's contract of a SingleTypeKVCacheManager, with one difference: when a request needs
new blocks it also gets the spare blocks that fill the chunk up, adjacent where the pool has them.
Spare blocks are a bonus, never a need:

- ``get_num_blocks_to_allocate`` stays vLLM's and counts what is needed, so that a request is
  never refused or preempted because a chunk does not fit;
- ``allocate_new_blocks`` adds spare blocks only from blocks that hold no cached prefix, only after
  the other KV cache groups' needs of the same step, and only above a reserve of the pool;
- a block table never exceeds ``cdiv(max_model_len, block_size)`` blocks.

Until ``configure_growth`` is called (by ``BMCScheduler``) a manager behaves as vLLM's own. Knows
nothing of layers or memory. Growth happens in one place, ``_ChunkedGrowth``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)

from bmc_core.policy import BMCPolicy
from bmc_vllm.block_runs import take_chunks
from bmc_vllm.integrity import check_integrity

RESERVE_DIVISOR = 8
"""Spare blocks are taken only while 1/8 of the pool stays free: below that, growth is by need."""


class GrowthStats(NamedTuple):
    """Counters of the managers of one scheduler.

    Attributes:
        growths: growths since the start.
        rows_reserved: rows in the block tables of all requests now; with several KV cache groups
            each counts its own.
        rows_spare: those of them that are held but not needed yet.
    """

    growths: int
    rows_reserved: int
    rows_spare: int


@dataclass
class GrowthState:
    """What the managers of one scheduler share.

    Attributes:
        policy: answers how many rows to hold.
        max_model_len: rows that no request exceeds.
        managers: all managers on the block pool, in the order in which vLLM asks them.
        touched: ids of blocks handed out since their memory was last released; None when
            nobody releases memory.
    """

    policy: BMCPolicy
    max_model_len: int
    managers: Sequence[SingleTypeKVCacheManager]
    touched: set[int] | None = None
    growths: int = field(default=0, init=False)

    def stats(self) -> GrowthStats:
        reserved = spare = 0
        for manager in self.managers:
            if isinstance(manager, _ChunkedGrowth):
                rows = manager.held_rows()
                reserved += rows[0]
                spare += rows[1]
        return GrowthStats(self.growths, reserved, spare)


class _ChunkedGrowth(SingleTypeKVCacheManager):
    """Mixin over a vLLM manager: growth by chunks. See the module docstring."""

    _growth: GrowthState | None = None

    def configure_growth(self, growth: GrowthState) -> None:
        """Turns chunked growth on; called once, before the first request."""
        self._growth = growth
        self._limit_rows = cdiv(growth.max_model_len, self.block_size) * self.block_size
        self._chunk_blocks = max(1, growth.policy.r // self.block_size)
        self._rows_needed: dict[str, int] = {}
        own_id = self.kv_cache_group_id
        self._later_managers = [m for m in growth.managers if m.kv_cache_group_id > own_id]
        # A manager with its own way to allocate (Mamba states, cross attention) may need any
        # number of blocks after us, so next to one there are no spare blocks.
        self._can_spare = all(needs_blocks_by_length(m) for m in self._later_managers)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Blocks for ``num_tokens`` rows of the request, and the spare ones of the chunk."""
        growth = self._growth
        if growth is None:
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self._rows_needed[request_id] = num_tokens
        blocks = self.req_to_blocks[request_id]
        needed = cdiv(num_tokens, self.block_size) - len(blocks)
        # Asked for no more rows than are held, vLLM's method only makes the private copy of a
        # partially shared block, if one is due.
        copies = super().allocate_new_blocks(
            request_id, len(blocks) * self.block_size, num_tokens_main_model
        )
        if needed <= 0:
            return copies
        spare = self._num_spare_blocks(growth, request_id, num_tokens, len(blocks), needed)
        last = blocks[-1] if blocks and not blocks[-1].is_null else None
        new_blocks = take_chunks(
            self.block_pool, needed, spare, self._chunk_blocks, last.block_id if last else None
        )
        blocks.extend(new_blocks)
        growth.growths += 1
        if growth.touched is not None:
            growth.touched.update(block.block_id for block in new_blocks)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new_blocks)
        return copies + new_blocks

    def _num_spare_blocks(
        self, growth: GrowthState, request_id: str, num_tokens: int, held: int, needed: int
    ) -> int:
        if not self._can_spare:
            return 0
        rows = growth.policy.rows_to_hold(
            held=held * self.block_size,
            needed=num_tokens,
            limit=max(self._limit_rows, num_tokens),
        )
        wanted = cdiv(rows, self.block_size) - held - needed
        others = sum(
            max(0, cdiv(num_tokens, m.block_size) - len(m.req_to_blocks.get(request_id, ())))
            + (request_id in m._partial_hit_reqs)
            for m in self._later_managers
        )
        free = self.block_pool.get_num_free_blocks() - needed - others
        reserve = self.block_pool.num_gpu_blocks // RESERVE_DIVISOR
        return max(0, min(wanted, free - reserve))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        if self._growth is not None:
            self._rows_needed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def held_rows(self) -> tuple[int, int]:
        """Rows in all block tables, and how many of them are spare."""
        reserved = spare = 0
        for request_id, blocks in self.req_to_blocks.items():
            # Null blocks (behind a sliding window) only ever stand at the front.
            first = bisect_left(blocks, True, key=lambda block: not block.is_null)
            reserved += (len(blocks) - first) * self.block_size
            rows = self._rows_needed.get(request_id)
            if rows is not None:
                spare += max(0, len(blocks) * self.block_size - rows)
        return reserved, spare

    def check_integrity(self) -> None:
        """Checks the pool and every manager on it; see ``integrity.check_integrity``."""
        managers = self._growth.managers if self._growth is not None else [self]
        check_integrity(self.block_pool, managers)


def needs_blocks_by_length(manager: SingleTypeKVCacheManager) -> bool:
    """Whether the manager takes exactly the blocks that a sequence's length asks for."""
    return isinstance(manager, _ChunkedGrowth) or (
        type(manager).allocate_new_blocks is SingleTypeKVCacheManager.allocate_new_blocks
    )


class BMCFullAttentionManager(_ChunkedGrowth, FullAttentionManager):
    """Full attention: all blocks are held until the request ends."""


class BMCSlidingWindowManager(_ChunkedGrowth, SlidingWindowManager):
    """Sliding window: blocks behind the window are freed by vLLM's own method."""


def configure_growth(
    managers: Sequence[SingleTypeKVCacheManager],
    policy: BMCPolicy,
    max_model_len: int,
    track_touched: bool,
) -> GrowthState:
    """Turns chunked growth on in every BMC manager among ``managers``."""
    state = GrowthState(policy, max_model_len, managers, set() if track_touched else None)
    for manager in managers:
        if isinstance(manager, _ChunkedGrowth):
            manager.configure_growth(state)
    return state
