"""The layout "rows": K and V as plain tensors, any device, any dtype.

`keys` and `values` are views of the valid rows, never the padded tensors: whoever attends over them
sees no spare row. A view is good until the store changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from bmc_core.kv_store.base import BUFFER_BYTES, KVStore, new_tensor


class RowsStore(KVStore):
    """Two tensors `[batch, heads, capacity, size]`; K and V may differ in size.

    They grow one after the other, so that only one of them exists twice at a time.
    """

    layout = "rows"
    row_multiple = 1

    _key: torch.Tensor | None = None
    _value: torch.Tensor | None = None

    def fits(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        return (
            self._key is not None
            and self._value is not None
            and _same_but_rows(key, self._key)
            and _same_but_rows(value, self._value)
            and key.shape[2] == value.shape[2]
        )

    def keys(self) -> torch.Tensor:
        return self._tensors()[0].narrow(2, 0, self.length)

    def values(self) -> torch.Tensor:
        return self._tensors()[1].narrow(2, 0, self.length)

    @property
    def batch_size(self) -> int:
        return 0 if self._key is None else self._key.shape[0]

    @property
    def row_bytes(self) -> int:
        return sum(
            tensor.shape[0] * tensor.shape[1] * tensor.shape[3] * tensor.element_size()
            for tensor in self._tensors()
        )

    @property
    def num_bytes(self) -> int:
        return 0 if self._key is None else sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._key is None or self._value is None:
            raise RuntimeError("the KV store is empty: nothing was appended yet")
        return self._key, self._value

    def _start(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._key = new_tensor((*key.shape[:2], 0, key.shape[3]), key, dense=False)
        self._value = new_tensor((*value.shape[:2], 0, value.shape[3]), value, dense=False)

    def _release(self) -> None:
        self._key = self._value = None

    def _hold(self, capacity: int, dropped: int, *, dense: bool) -> None:
        key, value = self._tensors()
        if dropped:
            both = (
                self._resized(key, capacity, dropped, dense),
                self._resized(value, capacity, dropped, dense),
            )
            self._key, self._value = both
            self.counters.allocated(sum(tensor.nbytes for tensor in both))
            self.counters.released(key.nbytes + value.nbytes)
        else:
            # Should the second fail, K has more room than `capacity` says: no harm.
            if key.shape[2] != capacity:
                self._key = self._resized(key, capacity, 0, dense)
                self.counters.allocated(self._key.nbytes)
                self.counters.released(key.nbytes)
                del key
            if value.shape[2] != capacity:
                self._value = self._resized(value, capacity, 0, dense)
                self.counters.allocated(self._value.nbytes)
                self.counters.released(value.nbytes)
        self.capacity = capacity

    def _resized(
        self, tensor: torch.Tensor, capacity: int, dropped: int, dense: bool
    ) -> torch.Tensor:
        shape = (*tensor.shape[:2], capacity, tensor.shape[3])
        resized = new_tensor(shape, tensor, dense=dense)
        kept = self.length - dropped
        resized.narrow(2, 0, kept).copy_(tensor.narrow(2, dropped, kept))
        return resized

    def _slide(self, dropped: int) -> None:
        move_to_front(self._tensors(), dropped, self.length)

    def _prepare_write(self, first: int, rows: int, capacity: int) -> None:
        """Nothing: rows are copied straight to their places."""

    def _write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        for tensor, rows in zip(self._tensors(), (key, value), strict=True):
            tensor.narrow(2, self.length, rows.shape[2]).copy_(rows)

    def _gathered(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dense = self._dense(self.length, self.capacity)
        return tuple(gathered(tensor, indices, self.length, dense) for tensor in self._tensors())

    def _adopt(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._key, self._value = tensors

    def _reorder(self, indices: torch.Tensor) -> None:
        parts = [tensor.narrow(2, 0, self.length) for tensor in self._tensors()]
        reorder_in_place(parts, indices)


def _same_but_rows(rows: torch.Tensor, held: torch.Tensor) -> bool:
    return (
        rows.dim() == 4
        and rows.shape[:2] == held.shape[:2]
        and rows.shape[3] == held.shape[3]
        and rows.dtype == held.dtype
        and rows.device == held.device
    )


def gathered(tensor: torch.Tensor, indices: torch.Tensor, rows: int, dense: bool) -> torch.Tensor:
    """A new tensor like `tensor` (dimensions: sequences, heads, rows, ...) of other sequences.

    Only the first `rows` rows are copied.
    """
    result = new_tensor((indices.shape[0], *tensor.shape[1:]), tensor, dense=dense)
    for target, source in enumerate(indices.tolist()):
        result[target].narrow(1, 0, rows).copy_(tensor[source].narrow(1, 0, rows))
    return result


def move_to_front(parts: Sequence[torch.Tensor], first: int, end: int) -> None:
    """Elements [first, end) of dimension 2 of each part move to its beginning."""
    kept = end - first
    if kept <= 8 * first:  # a few pieces, of which none overlaps where it goes
        for part in parts:
            for begin in range(0, kept, first):
                count = min(first, kept - begin)
                part.narrow(2, begin, count).copy_(part.narrow(2, begin + first, count))
        return
    for piece, copy in _beside_copies([part.narrow(2, 0, end) for part in parts], kept):
        copy.copy_(piece.narrow(2, first, kept))
        piece.narrow(2, 0, kept).copy_(copy)


def reorder_in_place(parts: Sequence[torch.Tensor], indices: torch.Tensor) -> None:
    """Along dimension 0 of each part, entry i becomes what `indices[i]` was."""
    indices = indices.to(parts[0].device)
    for piece, copy in _beside_copies(parts, parts[0].shape[2]):
        torch.index_select(piece, 0, indices, out=copy)
        piece.copy_(copy)


def _beside_copies(
    parts: Sequence[torch.Tensor], count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A few heads (dimension 1) of a part at a time, and contiguous memory for `count` of their
    elements along dimension 2.

    It is always the same memory, taken before the first piece is handed out: who changes the pieces
    changes all of them, or finds no memory and changes none.
    """
    sizes = [math.prod((part.shape[0], count, *part.shape[3:])) for part in parts]
    heads = max(1, min(parts[0].shape[1], BUFFER_BYTES // max(1, max(sizes) * parts[0].itemsize)))
    buffer = parts[0].new_empty(heads * max(sizes))
    for part, size in zip(parts, sizes, strict=True):
        for begin in range(0, part.shape[1], heads):
            piece = part[:, begin : begin + heads]
            batch, taken, _, *rest = piece.shape
            yield piece, buffer[: taken * size].view(batch, taken, count, *rest)
