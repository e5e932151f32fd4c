"""Index tensors that the native kernel needs for a batch of equally long sequences.

Promises the same tensors for the same shapes, as long as the shapes stay few. Knows nothing of what
is in the cache.
"""

from __future__ import annotations

import torch

from bmc_core.attention import AttentionBatch

MAX_STEPS = 32
"""Index tensors of this many different shapes are kept; then they are made anew."""


class StepTables:
    """Index tensors of one step, made once and shared by all stores of the same shape.

    The layers of a model do the same thing one after the other: same batch, same rows, same
    capacity. What depends only on these is made for the first and found by the others.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int, int, int], torch.Tensor] = {}
        self._batches: dict[tuple[int, ...], tuple[AttentionBatch, torch.Tensor | None]] = {}
        self._sequences: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> StepTables:
        return StepTables()

    def __reduce__(self) -> tuple[type[StepTables], tuple[()]]:
        return StepTables, ()

    def slots(self, batch: int, capacity: int, first: int, rows: int) -> torch.Tensor:
        """int64 `[batch * rows]`: where rows [first, first + rows) of each sequence go."""
        shape = (batch, capacity, first, rows)
        slots = self._slots.get(shape)
        if slots is None:
            if len(self._slots) >= MAX_STEPS:
                self._slots.clear()
            start = torch.arange(batch).mul_(capacity)
            slots = (start[:, None] + torch.arange(first, first + rows)).flatten()
            self._slots[shape] = slots
        return slots

    def batch(
        self,
        batch: int,
        capacity: int,
        length: int,
        query_rows: int,
        *,
        hidden: int = 0,
        first_rows: torch.Tensor | None = None,
    ) -> AttentionBatch:
        """`query_rows` query rows at the end of `length` rows, for each sequence.

        The first `hidden` rows are seen by no query, nor are, of those after them, the first
        `first_rows[s]` (int32 `[batch]`) of sequence s.
        """
        identity = 0 if first_rows is None else id(first_rows)
        shape = (batch, capacity, length, query_rows, hidden, identity)
        found, _ = self._batches.get(shape, (None, None))
        if found is None:
            if len(self._batches) >= MAX_STEPS:
                self._batches.clear()
            starts, table = self._starts(batch, query_rows)
            lengths = torch.full((batch,), length, dtype=torch.int32)
            first = first_rows
            if hidden:
                first = torch.full_like(lengths, hidden) if first is None else first + hidden
            found = AttentionBatch(starts, lengths, table, capacity, first_rows=first)
            # `first_rows` is kept, so that no other tensor gets its id meanwhile.
            self._batches[shape] = found, first_rows
        return found

    def _starts(self, batch: int, query_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (batch, query_rows)
        found = self._sequences.get(shape)
        if found is None:
            if len(self._sequences) >= MAX_STEPS:
                self._sequences.clear()
            starts = torch.arange(batch + 1, dtype=torch.int32).mul_(query_rows)
            found = (starts, torch.arange(batch, dtype=torch.int32)[:, None])
            self._sequences[shape] = found
        return found
