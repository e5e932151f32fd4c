"""Rows for draft tokens that cost no other request anything.

Promises: draft tokens get

- the rows that their request's own tokens leave free in the blocks that it holds, or takes anyway;
- behind those, as a *growth for drafts*, the next free blocks of the request's own chunk, if they
  hold no cached prefix, nobody waits, no running request has to look for blocks outside its own
  chunk in this step, and one free block is left for each of them.

What such a growth took and accepted tokens do not fill is taken back before a step in which a
request waits, needs blocks outside its chunk or finds the pool short. Every step therefore
schedules, admits, refuses and preempts as if there had never been a draft token.

Knows nothing of which draft tokens pay; that is `drafts`' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import CrossAttentionSpec, MambaSpec
from vllm.v1.request import Request

from bmc_vllm.kv_cache_manager import ChunkedGrowth, GrowthState, last_id

TakenBack = dict[str, tuple[int, ...]]
"""By request: how many blocks were taken from the end of each of its block tables."""


class SpareRows:
    """See the module docstring. One for a scheduler; `begin_step` comes before all else."""

    def __init__(
        self,
        managers: Sequence[SingleTypeKVCacheManager],
        growth: GrowthState | None,
        may_grow: bool,
    ) -> None:
        """
        Args:
            managers: all managers of the scheduler.
            growth: what the managers that grow by chunks share.
            may_grow: whether blocks may be taken for drafts at all. Workers must be able to give
                them back, see `shorten_tables`.
        """
        # A block of the others is a state, or holds an encoder's rows.
        others = MambaSpec | CrossAttentionSpec
        self._managers = [m for m in managers if not isinstance(m.kv_cache_spec, others)]
        self._growth = growth if may_grow else None
        if not all(isinstance(manager, ChunkedGrowth) for manager in managers):
            self._growth = None
        self._grown: set[str] = set()  # They may hold more blocks than their own tokens need.
        self._left = 0  # Blocks that growths for drafts may still take in this step.
        self._claimed: set[int] = set()  # Blocks that this step will take.
        self._granted: dict[str, int] = {}  # Rows of who has set blocks aside.

    def begin_step(self, running: Sequence[Request], waits: bool, budget: int) -> TakenBack:
        """Decides whether there are growths for drafts in the next step.

        Args:
            running: the requests that run, before anything is scheduled.
            waits: whether any other request waits.
            budget: most tokens of the step.

        Returns:
            The blocks that were taken back.
        """
        self._left = 0
        if self._growth is None:
            return {}
        self._growth.draft_rows.clear()
        self._granted.clear()
        self._claimed.clear()
        own = {r.request_id: min(r.num_tokens, r.num_computed_tokens + budget) for r in running}
        missing = {request_id: self._missing(request_id, rows) for request_id, rows in own.items()}
        needed = sum(map(sum, missing.values()))
        free = self._growth.queue.num_free_blocks
        growing = [(name, counts) for name, counts in missing.items() if any(counts)]
        if waits or needed > free or not all(self._claim_own(*grows) for grows in growing):
            return self._take_back(self._growth)
        self._left = free - needed - len(running) * len(self._managers)
        return {}

    def rows(self, request_id: str, own: int, wanted: int, claim: bool = False) -> int:
        """Rows up to which a request's draft tokens may go.

        Args:
            own: rows of the tokens that are no drafts, the next step's among them.
            wanted: rows that it would have; more are never given.
            claim: set the blocks of a growth aside for `take`, which has to follow: no other
                request is offered them in this step.
        """
        rows = wanted
        for manager in self._managers:
            held, size = len(manager.req_to_blocks.get(request_id, ())), manager.block_size
            rows = min(rows, max(held, cdiv(own, size)) * size)
        if rows < wanted and self._left > 0:
            rows = max(rows, self._grow(request_id, own, wanted, claim))
        return rows

    def take(self, request_id: str, own: int, wanted: int) -> int:
        """Of the blocks that were set aside for a request, takes those for ``wanted`` rows.

        Returns:
            How many the request will take with the step.
        """
        granted = self._granted.pop(request_id, 0)
        if self._growth is None or not granted:
            return 0
        rows = min(wanted, granted)
        self._growth.draft_rows[request_id] = rows
        return self._blocks_ahead(request_id, own, rows)

    def forget(self, request_id: str) -> None:
        """The request holds no blocks any longer."""
        self._grown.discard(request_id)

    def _missing(self, request_id: str, rows: int) -> list[int]:
        """By manager: blocks that a request lacks for so many rows."""
        return [
            max(0, cdiv(rows, m.block_size) - len(m.req_to_blocks.get(request_id, ())))
            for m in self._managers
        ]

    def _claim_own(self, request_id: str, counts: Sequence[int]) -> bool:
        """Whether a request finds the blocks of its own tokens in its chunk; sets them aside."""
        assert self._growth is not None
        for manager, count in zip(self._managers, counts, strict=True):
            last = last_id(manager.req_to_blocks.get(request_id))
            ids = self._growth.queue.free_behind(last)[:count] if last is not None else range(0)
            if len(ids) < count or not self._claimed.isdisjoint(ids):
                return False
            self._claimed.update(ids)
        return True

    def _grow(self, request_id: str, own: int, wanted: int, claim: bool) -> int:
        """As `rows`, with the blocks that a growth for drafts would take."""
        ids: list[list[int]] = []
        rows = wanted
        for manager in self._managers:
            ids.append(self._next_blocks(manager, request_id, own, wanted))
            held = len(manager.req_to_blocks.get(request_id, ()))
            blocks = max(held, cdiv(own, manager.block_size)) + len(ids[-1])
            rows = min(rows, blocks * manager.block_size)
        taken = self._blocks_ahead(request_id, own, rows)
        if taken > self._left:
            return 0
        if claim and taken:
            self._left -= taken
            self._claimed.update(*ids)
            self._granted[request_id] = rows
            self._grown.add(request_id)
        return rows

    def _blocks_ahead(self, request_id: str, own: int, rows: int) -> int:
        """Blocks beyond those of its ``own`` rows that a request takes if it gets ``rows``."""
        blocks = 0
        for manager in self._managers:
            held = len(manager.req_to_blocks.get(request_id, ()))
            size = manager.block_size
            blocks += max(0, cdiv(rows, size) - max(held, cdiv(own, size)))
        return blocks

    def _next_blocks(
        self, manager: SingleTypeKVCacheManager, request_id: str, own: int, wanted: int
    ) -> list[int]:
        """Ids of the blocks of its chunk that a request may take for drafts, in order."""
        assert self._growth is not None
        blocks = manager.req_to_blocks.get(request_id, ())
        last = last_id(blocks)
        if last is None:
            return []
        missing = [max(0, cdiv(n, manager.block_size) - len(blocks)) for n in (own, wanted)]
        ids = []
        for block_id in self._growth.queue.free_behind(last)[missing[0] : missing[1]]:
            holds_prefix = manager.block_pool.blocks[block_id].block_hash is not None
            if holds_prefix or block_id in self._claimed:
                break
            ids.append(block_id)
        return ids

    def _ahead(self, request_id: str, request: Request) -> tuple[int, ...]:
        """By manager: blocks that a request would not hold without drafts."""
        return tuple(
            max(
                0,
                len(manager.req_to_blocks.get(request_id, ()))
                - cdiv(request.num_computed_tokens, manager.block_size),
            )
            for manager in self._managers
        )

    def _take_back(self, growth: GrowthState) -> TakenBack:
        taken: TakenBack = {}
        for request_id in self._grown:
            counts = self._ahead(request_id, growth.requests[request_id])
            for manager, count in zip(self._managers, counts, strict=True):
                blocks = manager.req_to_blocks[request_id]
                ahead = blocks[len(blocks) - count :]
                del blocks[len(blocks) - count :]
                manager.block_pool.free_blocks(reversed(ahead))
            if any(counts):
                taken[request_id] = counts
        self._grown.clear()
        return taken


def shorten_tables(model_runner: Any, taken_back: TakenBack) -> None:
    """A worker's part of taking blocks back: its block tables end where the scheduler's do.

    To be called before the step whose `SchedulerOutput` names the blocks. vLLM's runner (V1) only
    ever appends to its tables.
    """
    batch = model_runner.input_batch
    for request_id, counts in taken_back.items():
        state = model_runner.requests.get(request_id)
        if state is None:
            continue
        for block_ids, count in zip(state.block_ids, counts, strict=True):
            del block_ids[len(block_ids) - count :]
        row = batch.req_id_to_index.get(request_id)
        if row is None:
            continue
        for table, count in zip(batch.block_table.block_tables, counts, strict=True):
            end = table.num_blocks_per_row[row]
            table.block_table.np[row, end - count : end] = 0
            table.num_blocks_per_row[row] = end - count
