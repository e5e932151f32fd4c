"""Block managers whose requests grow ``r`` rows at a time.

Promises vLLM's contract of a SingleTypeKVCacheManager to the letter: a request holds the blocks
that vLLM's own manager would hold, at the same time, and is admitted, refused or preempted as
there. What differs is which blocks they are. New ones come from a chunk of r rows that lies side
by side; the rest of the chunk stays free, but is passed by when others look for a chunk, so that
the request grows into it. Spare rows are a bonus that whoever is in need takes.

Until ``configure_growth`` is called (by ``BMCScheduler``) a manager behaves as vLLM's own. Knows
nothing of layers or memory; which blocks are taken is `free_chunks.ChunkedFreeQueue`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request

from bmc_vllm.free_chunks import ChunkedFreeQueue, Place
from bmc_vllm.integrity import check_integrity


class GrowthStats(NamedTuple):
    """Counters of the managers of one scheduler; with several KV cache groups each counts its own.

    Attributes:
        growths: growths since the start.
        rows_reserved: rows of the blocks that all requests hold now, and of the free blocks that
            they would grow into.
        rows_spare: those of them that no token has been scheduled for.
    """

    growths: int
    rows_reserved: int
    rows_spare: int


@dataclass
class GrowthState:
    """What the managers of one scheduler share.

    Attributes:
        queue: the free blocks of their pool.
        managers: all managers on the pool.
        requests: the scheduler's requests by id.
        draft_rows: rows that requests get in the next step at least, for the sake of draft tokens.
            Whoever sets them knows that the blocks are free, and are the next of the request's
            chunk.
    """

    queue: ChunkedFreeQueue
    managers: Sequence[SingleTypeKVCacheManager]
    requests: Mapping[str, Request]
    draft_rows: dict[str, int] = field(default_factory=dict)

    def stats(self) -> GrowthStats:
        """Visits every request."""
        reserved = spare = 0
        for manager in self.managers:
            if isinstance(manager, ChunkedGrowth):
                for request_id in manager.req_to_blocks:
                    rows = manager.rows(request_id)
                    reserved += rows[0]
                    spare += rows[1]
        return GrowthStats(self.queue.growths, reserved, spare)


class ChunkedGrowth(SingleTypeKVCacheManager):
    """Mixin over a vLLM manager: growth by chunks. See the module docstring."""

    _growth: GrowthState | None = None

    def configure_growth(self, growth: GrowthState) -> None:
        """Turns chunked growth on; called once, before the first request."""
        self._growth = growth

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """vLLM's method, whose new blocks are the next of the request's chunk."""
        blocks = self.req_to_blocks[request_id]
        if self._growth is not None and self._growth.draft_rows:
            num_tokens = max(num_tokens, self._growth.draft_rows.get(request_id, 0))
        if num_tokens <= len(blocks) * self.block_size and request_id not in self._partial_hit_reqs:
            return []  # As vLLM's method, at once: most steps of most requests end here.
        if self._growth is None:
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        with self._growth.queue.placing(self._place(request_id, blocks, num_tokens)):
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *others: Any,
        **settings: Any,
    ) -> None:
        """vLLM's method (rows that a connector brings), placed in the same way.

        Its setting `record_for_zeroing` came with 0.32: what is given is handed through.
        """
        arguments = (request_id, num_local_computed_tokens, num_external_computed_tokens, *others)
        if self._growth is None:
            return super().allocate_external_computed_blocks(*arguments, **settings)
        blocks = self.req_to_blocks[request_id]
        num_tokens = num_local_computed_tokens + num_external_computed_tokens
        with self._growth.queue.placing(self._place(request_id, blocks, num_tokens)):
            return super().allocate_external_computed_blocks(*arguments, **settings)

    def _place(self, request_id: str, blocks: list[KVCacheBlock], num_tokens: int) -> Place:
        """Behind the request's last block; the whole prompt, or as much of it as is held at a time,
        gets room with its first chunk."""
        assert self._growth is not None
        request = self._growth.requests.get(request_id)
        rows = max(num_tokens, request.num_prompt_tokens if request is not None else 0)
        room = cdiv(rows, self.block_size) - len(blocks)
        if self.max_admission_blocks_per_request is not None:  # Behind a window blocks are freed.
            room = min(room, self.max_admission_blocks_per_request)
        last = last_id(blocks)
        return Place(self._owner(request_id), last, room)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        if self._growth is not None:
            blocks = self.req_to_blocks.get(request_id)
            last = last_id(blocks)
            self._growth.queue.release(self._owner(request_id), last)
        return super().pop_blocks_for_free(request_id)

    def _owner(self, request_id: str) -> tuple[int, str]:
        return self.kv_cache_group_id, request_id

    def rows(self, request_id: str) -> tuple[int, int]:
        """Rows that the request holds or would grow into, and those without a token."""
        assert self._growth is not None
        blocks = self.req_to_blocks.get(request_id, [])
        held = len(blocks) * self.block_size
        request = self._growth.requests.get(request_id)
        unused = max(0, held - request.num_computed_tokens) if request is not None else 0
        last = last_id(blocks)
        ahead = 0
        if last is not None:
            ahead = self._growth.queue.num_spare(self._owner(request_id), last) * self.block_size
        # Behind a sliding window null blocks stand for those that were freed.
        nulls = sum(block.is_null for block in blocks) if blocks and blocks[0].is_null else 0
        return held - nulls * self.block_size + ahead, unused + ahead

    def check_integrity(self) -> None:
        """Checks the pool and every manager on it; see ``integrity.check_integrity``."""
        managers = self._growth.managers if self._growth is not None else [self]
        check_integrity(self.block_pool, managers)


def last_id(blocks: Sequence[KVCacheBlock] | None) -> int | None:
    """Of the block behind which a table goes on; None where there is none, or the null block."""
    return blocks[-1].block_id if blocks and not blocks[-1].is_null else None


class BMCFullAttentionManager(ChunkedGrowth, FullAttentionManager):
    """Full attention: all blocks are held until the request ends."""


class BMCSlidingWindowManager(ChunkedGrowth, SlidingWindowManager):
    """Sliding window: blocks behind the window are freed by vLLM's own method."""


def configure_growth(
    managers: Sequence[SingleTypeKVCacheManager], r: int, requests: Mapping[str, Request]
) -> GrowthState | None:
    """Turns chunked growth on in every BMC manager among ``managers``.

    Args:
        managers: all managers on one block pool, from which no block was taken yet.
        r: rows of a chunk; rounded up to whole blocks of each manager's pool.
        requests: the scheduler's requests by id.

    Returns:
        What they share; None if there is no BMC manager: then nothing is changed.
    """
    growing = [manager for manager in managers if isinstance(manager, ChunkedGrowth)]
    if not growing:
        return None
    pool = growing[0].block_pool
    chunk_blocks = max(1, cdiv(r, max(manager.block_size for manager in growing)))
    queue = ChunkedFreeQueue(pool.free_block_queue, pool.blocks, chunk_blocks)
    pool.free_block_queue = queue
    state = GrowthState(queue, managers, requests)
    for manager in growing:
        manager.configure_growth(state)
    return state
