"""The chunked KV store: K and V of one layer, growing as a policy says.

Between two growths new rows are written in place, into the spare rows at the end. When they are
used up, the tensor grows and the valid rows are copied to their new places (BMC, arXiv 2511.12031).
Forgetting the newest rows moves one counter back: no copy, no allocation.

Promises: a call that raises leaves the store as it was, with its old rows usable; Ctrl-C never
leaves rows half moved. Knows nothing of layers, of models and of what the rows mean; all sequences
of a store have the same number of rows.

Here is what the layouts share.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from bmc_core.kv_store.counters import KVCounters
from bmc_core.kv_store.interrupts import uninterrupted
from bmc_core.kv_store.moves import reorder_in_place
from bmc_core.machine.memory import DENSE, fits_huge_pages
from bmc_core.policy import GrowthPolicy

MIN_SPARE_ROWS = 16
"""A sliding store may have at least so many spare rows, however short its window is."""


def rows_to_hold(policy: GrowthPolicy, held: int, needed: int, limit: int | None) -> int:
    """The policy's answer, where `limit` is an expectation that may turn out too small.

    A sequence that outgrows it moves it to the double, so that the growths stay as rare as the
    policy wants them.

    Raises:
        TypeError, ValueError: the policy's answer is not an int, or fewer rows than needed.
    """
    while limit is not None and needed > limit:
        limit = max(1, 2 * limit)
    rows = policy.rows_to_hold(held, needed, limit)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < needed:
        kind = ValueError if isinstance(rows, int) else TypeError
        raise kind(
            f"policy {policy!r}: rows_to_hold(held={held}, needed={needed}, limit={limit}) is "
            f"{rows!r}; allowed: an int >= {needed}"
        )
    return rows


class KVStore(ABC):
    """K and V of one layer, `[batch, heads, rows, head size]` each, for all sequences of a batch.

    Args:
        policy: how many rows to hold when the held ones are not enough.
        limit: rows that a sequence is expected to reach at most; None: not known. Outgrowing it is
            allowed.
        counters: where to count; None: counters of its own.

    Attributes:
        length: valid rows per sequence. `capacity`: rows that fit without a growth.
        epoch: changes whenever rows that are held may have moved or changed.
    """

    layout: ClassVar[str]
    row_multiple: ClassVar[int]

    def __init__(
        self,
        policy: GrowthPolicy,
        *,
        limit: int | None = None,
        counters: KVCounters | None = None,
    ) -> None:
        if limit is not None and limit < 0:
            raise ValueError(f"limit={limit}: expected a number of rows >= 0, or None")
        self.policy = policy
        self.limit = limit
        self.counters = counters if counters is not None else KVCounters()
        self.length = 0
        self.capacity = 0
        self.epoch = 0

    # What a layout supplies.

    @abstractmethod
    def fits(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether batch, heads, sizes, dtype and device go with what is held."""

    @abstractmethod
    def keys(self) -> torch.Tensor:
        """The valid keys `[batch, heads, length, key size]`."""

    @abstractmethod
    def values(self) -> torch.Tensor:
        """The valid values `[batch, heads, length, value size]`."""

    @property
    @abstractmethod
    def has_shape(self) -> bool:
        """Whether rows were appended, be they none, since it was made or released."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Sequences; 0 before the first append."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of K and V of one row of all sequences."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of the tensors that are held."""

    @abstractmethod
    def _start(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Takes shapes, dtype and device from the first rows; holds nothing yet."""

    @abstractmethod
    def _release(self) -> None:
        """Lets go of the tensors."""

    @abstractmethod
    def _hold(self, capacity: int, dropped: int, *, dense: bool) -> None:
        """Holds `capacity` rows, the first `dropped` valid rows left out.

        `dense`: whether valid rows will soon fill most of them.
        """

    @abstractmethod
    def _slide(self, dropped: int) -> None:
        """Moves the valid rows after the first `dropped` to the beginning; no row has moved where
        it finds no memory."""

    @abstractmethod
    def _writable(self, rows: torch.Tensor) -> torch.Tensor:
        """New keys or values as `_write` takes them: the same, or a copy."""

    @abstractmethod
    def _prepare_write(
        self, key: torch.Tensor, value: torch.Tensor, first: int, capacity: int
    ) -> None:
        """Allocates what `_write` will need for these rows at `first`, and raises what it would."""

    @abstractmethod
    def _write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes rows behind the valid ones; there is room."""

    @abstractmethod
    def _gathered(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """New tensors whose sequence i is this store's `indices[i]`; nothing changes yet."""

    @abstractmethod
    def _adopt(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Replaces the tensors by `_gathered`'s."""

    @abstractmethod
    def _parts(self) -> list[torch.Tensor]:
        """Views of all that is valid, sequences and heads their first two dimensions."""

    # What a user calls.

    def append(self, key: torch.Tensor, value: torch.Tensor, *, keep: int | None = None) -> int:
        """Adds new rows behind the valid ones.

        Args:
            key: `[batch, heads, rows, key size]`; its values are copied, gradients are not kept.
            value: `[batch, heads, rows, value size]`, same device; same dtype if packed.
            keep: rows, counted back from the newest valid one, that must stay; the store may drop
                older ones rather than grow. None: all stay.

        Returns:
            How many of the oldest rows were dropped.

        Raises:
            ValueError: shapes, dtypes or devices do not go with each other or with what is held.
            TypeError, ValueError: the policy's answer is no number of rows, or too small a one.
            RuntimeError: no memory for a growth. The rows that were held are as before.
        """
        if self.length == 0 and (self.capacity == 0 or not self.fits(key, value)):
            self._check_rows(key, value)
            with uninterrupted():
                self.release()
                self._start(key, value)
        elif not self.fits(key, value):
            raise ValueError(
                f"key {tuple(key.shape)} of {key.dtype} on {key.device} and value "
                f"{tuple(value.shape)} of {value.dtype} on {value.device} do not go with the rows "
                f"that are held; allowed: {self._held()}"
            )
        key, value = self._writable(key.detach()), self._writable(value.detach())
        dropped = self._make_room(key, value, keep)
        self._write(key, value)
        self.length += key.shape[2]
        return dropped

    def truncate(self, length: int) -> None:
        """Forgets the newest rows: one counter, no copy, no allocation.

        Raises:
            ValueError: `length` is negative or above the valid rows.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: expected 0 to {self.length} (the valid rows)")
        if length < self.length:
            self.length = length
            self.epoch += 1

    def clear(self) -> None:
        """Forgets all rows and keeps the memory."""
        self.truncate(0)

    def release(self) -> None:
        """Forgets all rows and gives the memory back; the next rows may be of any shape."""
        with uninterrupted():
            self.counters.released(self.num_bytes)
            self._release()
            self.length = self.capacity = 0
            self.epoch += 1

    def reorder(self, indices: torch.Tensor) -> None:
        """Sequence i becomes what `indices[i]` was (beam search), in place.

        Raises:
            ValueError, IndexError: not one index of a sequence for each sequence.
            RuntimeError: no memory. Nothing changed.
        """
        reorder_stores([self], indices)

    def gathered(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """First half of a change of the batch: the new tensors, to be given to `adopt`.

        Two halves, so that a caller with many stores can allocate for all before it changes any.

        Raises:
            ValueError, IndexError: an index that names no sequence. Nothing changed.
            RuntimeError: no memory. Nothing changed.
        """
        return self._gathered(self._checked_indices(indices))

    def adopt(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Second half: sequence i is now what `indices[i]` was when `gathered` was called."""
        before = self.num_bytes
        with uninterrupted():
            self._adopt(tensors)
            self.epoch += 1
            self.counters.allocated(self.num_bytes)
            self.counters.released(before)
            self.counters.copied(self.length, self.length * self.row_bytes)

    def select(self, indices: torch.Tensor) -> None:
        """Sequence i is now what `indices[i]` was; the batch may become smaller or larger."""
        self.adopt(self.gathered(indices))

    # Copies and pickles.

    def __copy__(self) -> KVStore:
        """As a deep copy: two stores must not write into the same memory."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVStore:
        """A store of its own with the same rows and capacity, good inside and outside
        `torch.inference_mode` wherever it was made."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(self._without_tensors(), memo))
        if self.has_shape:
            twin._adopt(self._gathered(torch.arange(self.batch_size)))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """For pickles: the valid rows, and the capacity as a number."""
        rows = None
        if self.has_shape:
            both = (self.keys(), self.values())
            rows = [held.clone(memory_format=torch.contiguous_format) for held in both]
        return {**self._without_tensors(), "rows": rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state["rows"]
        vars(self).update((name, held) for name, held in state.items() if name != "rows")
        if rows is not None:
            counters, length, capacity = self.counters, self.length, self.capacity
            # The pickled counters have these tensors already.
            self.counters, self.length, self.capacity = KVCounters(), 0, 0
            self._start(*rows)
            self._resize(capacity, 0, length)
            self._write(*rows)
            self.counters, self.length = counters, length

    def _without_tensors(self) -> dict[str, Any]:
        return {
            name: held for name, held in vars(self).items() if not isinstance(held, torch.Tensor)
        }

    # Shared inside.

    def _make_room(self, key: torch.Tensor, value: torch.Tensor, keep: int | None) -> int:
        """Room for these rows; returns how many of the oldest rows were dropped."""
        rows, droppable = key.shape[2], 0
        if keep is not None and self.length > keep:
            droppable = (self.length - keep) // self.row_multiple * self.row_multiple
        if self.length + rows <= self.capacity:
            # A window's store that a long prompt made much too large gives the memory back.
            oversized = droppable > self.capacity // 2 and self.capacity > 1024
            if not oversized:
                return 0
        with uninterrupted():
            if droppable:
                self._drop(key, value, keep or 0, droppable)
                return droppable
            target = rows_to_hold(self.policy, self.capacity, self.length + rows, self.limit)
            self._resize(target, 0, rows)
            return 0

    def _drop(self, key: torch.Tensor, value: torch.Tensor, keep: int, dropped: int) -> None:
        """Slides or resizes, so that there is room once the oldest rows are dropped."""
        rows, kept = key.shape[2], self.length - dropped
        target = self._window_capacity(kept + rows, keep)
        slides = target <= self.capacity <= 2 * target
        # All that writing may raise is raised before rows are dropped: only moving them can fail.
        self._prepare_write(key, value, kept, self.capacity if slides else target)
        if slides:
            self._slide(dropped)
            self.counters.copied(kept, kept * self.row_bytes)
        else:
            self._resize(target, dropped, rows)
        self.length -= dropped
        self.epoch += 1

    def _window_capacity(self, needed: int, keep: int) -> int:
        """Rows for a window: as much spare as the policy gives, at most one more window."""
        target = rows_to_hold(self.policy, needed, needed + 1, self.limit)
        return self._rounded(min(target, needed + max(keep, MIN_SPARE_ROWS)))

    def _resize(self, capacity: int, dropped: int, coming: int) -> None:
        """New tensors for what stays and the `coming` rows."""
        capacity = self._rounded(capacity)
        kept = self.length - dropped
        self._hold(capacity, dropped, dense=self._dense(kept + coming, capacity))
        self.counters.growths += 1
        if kept:
            self.counters.copied(kept, kept * self.row_bytes)
        self.epoch += 1

    def _dense(self, rows: int, capacity: int) -> bool:
        """Whether so many rows make huge pages worth while for `capacity` of them."""
        return rows >= DENSE * capacity and fits_huge_pages(capacity * self.row_bytes)

    def _rounded(self, rows: int) -> int:
        return -(-rows // self.row_multiple) * self.row_multiple

    def _checked_indices(self, indices: torch.Tensor) -> torch.Tensor:
        if indices.dtype == torch.bool and indices.shape == (self.batch_size,):
            indices = indices.nonzero().flatten()
        if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"indices of shape {tuple(indices.shape)} and {indices.dtype}; "
                "allowed: one dimension of integers"
            )
        batch = self.batch_size
        if indices.numel() and not (-batch <= int(indices.min()) <= int(indices.max()) < batch):
            raise IndexError(f"indices {indices.tolist()}: allowed are {-batch} to {batch - 1}")
        return torch.where(indices < 0, indices + batch, indices).to(torch.int64)

    def _check_rows(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)}: "
                "expected [batch, heads, rows, head size] with the same first three"
            )
        if key.device != value.device:
            raise ValueError(f"value is on {value.device}; allowed: {key.device} (key's)")

    def _held(self) -> str:
        keys, values = self.keys(), self.values()
        return (
            f"on {keys.device}, key [{keys.shape[0]}, {keys.shape[1]}, rows, {keys.shape[3]}] of "
            f"{keys.dtype}, value [.., rows, {values.shape[3]}] of {values.dtype}"
        )


def reorder_stores(stores: Sequence[KVStore], indices: torch.Tensor) -> None:
    """In every store, sequence i becomes what `indices[i]` was, in place: in all or in none.

    Raises:
        ValueError, IndexError: not one index of a sequence for each sequence. Nothing changed.
        RuntimeError: no memory. Nothing changed.
    """
    for store in stores:
        indices = store._checked_indices(indices)
        if indices.shape[0] != store.batch_size:
            raise ValueError(
                f"indices: {indices.shape[0]} of them; "
                f"allowed: {store.batch_size}, one per sequence"
            )
    moving = [store for store in stores if store.length]
    if not moving or torch.equal(indices.cpu(), torch.arange(indices.shape[0])):
        return
    with uninterrupted():
        reorder_in_place([part for store in moving for part in store._parts()], indices)
        for store in moving:
            store.epoch += 1
            store.counters.copied(store.length, store.length * store.row_bytes)
