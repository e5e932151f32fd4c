"""The layout "rows": K and V as plain tensors, any device, any dtype, each its own.

`keys` and `values` are views of the valid rows, never the padded tensors: whoever attends over them
sees no spare row. A view is good until the store changes.
"""

from __future__ import annotations

import torch

from bmc_core.kv_store.base import KVStore
from bmc_core.kv_store.moves import move_to_front
from bmc_core.kv_store.tensors import new_tensor


class RowsStore(KVStore):
    """Two tensors `[batch, heads, capacity, size]`; K and V may differ in size and in dtype
    (under `torch.autocast`, rotated keys are float32 while values are bfloat16).

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
    def has_shape(self) -> bool:
        return self._key is not None

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
        both = [
            new_tensor((*rows.shape[:2], 0, rows.shape[3]), rows, dense=False)
            for rows in (key, value)
        ]
        self._key, self._value = both

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

    def _writable(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def _prepare_write(
        self, key: torch.Tensor, value: torch.Tensor, first: int, capacity: int
    ) -> None:
        # Rows are copied straight to their places. What torch cannot copy, it refuses here.
        for tensor, rows in zip(self._tensors(), (key, value), strict=True):
            tensor.narrow(2, 0, 0).copy_(rows.narrow(2, 0, 0))

    def _write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        for tensor, rows in zip(self._tensors(), (key, value), strict=True):
            tensor.narrow(2, self.length, rows.shape[2]).copy_(rows)

    def _gathered(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dense = self._dense(self.length, self.capacity)
        return tuple(gathered(tensor, indices, self.length, dense) for tensor in self._tensors())

    def _adopt(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._key, self._value = tensors

    def _parts(self) -> list[torch.Tensor]:
        return [tensor.narrow(2, 0, self.length) for tensor in self._tensors()]


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
