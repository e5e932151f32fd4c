"""Cache layers over the chunked KV store: one keeps every row, one keeps a window.

They answer transformers' `CacheLayerMixin` as its own dynamic layers do: the same lengths, the same
mask sizes, the same errors. Rejected speculative rows cost one counter.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin

from bmc_core.kv_store import KVStore, PackedStore
from bmc_transformers.gradients import refuse_gradients, wants_gradients
from bmc_transformers.lazy import PackedRows


class StoreMaker(Protocol):
    """Chooses the store for rows like these `[batch, heads, rows, size]` of K and V."""

    def layout(self, key: torch.Tensor, value: torch.Tensor) -> str: ...

    def make(self, key: torch.Tensor, value: torch.Tensor) -> KVStore: ...


class BMCLayer(CacheLayerMixin):
    """All rows of one layer.

    Args:
        stores: chooses the layout when the first rows come.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, stores: StoreMaker) -> None:
        # Not the base class's: its `keys` and `values` are attributes, here they are computed.
        self._stores = stores
        self.store: KVStore | None = None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.store is not None

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """The valid keys `[batch, heads, rows, size]`; a view, or a copy if packed."""
        return None if self.store is None or not self.store.has_shape else self.store.keys()

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """The valid values `[batch, heads, rows, size]`; a view, or a copy if packed."""
        return None if self.store is None or not self.store.has_shape else self.store.values()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.store = self._stores.make(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new rows and returns all that this step's queries may see.

        Returns:
            K and V `[batch, heads, rows, size]`: views of the store, or `PackedRows`.

        Raises:
            ValueError: other heads, sizes, dtype or batch than the rows that are held.
            RuntimeError: no memory. The layer is as before.
        """
        store = self._store_for(key_states, value_states)
        rows = self._append(store, key_states, value_states)
        tracked = wants_gradients(key_states) or wants_gradients(value_states)
        if isinstance(store, PackedStore):
            return (
                PackedRows.of(store, 0, rows, requires_grad=tracked),
                PackedRows.of(store, 1, rows, requires_grad=tracked),
            )
        hidden = store.length - rows
        key, value = store.keys(), store.values()
        if hidden:
            key, value = key.narrow(2, hidden, rows), value.narrow(2, hidden, rows)
        if tracked:
            return refuse_gradients(key), refuse_gradients(value)
        return key, value

    def _store_for(self, key: torch.Tensor, value: torch.Tensor) -> KVStore:
        """The store; while it is empty, its layout may still be chosen anew."""
        store = self.store
        if store is None or (store.length == 0 and not self._can_go_on(store, key, value)):
            fresh = self._stores.make(key, value)
            if store is not None:
                store.release()
            self.store = store = fresh
        return store

    def _can_go_on(self, store: KVStore, key: torch.Tensor, value: torch.Tensor) -> bool:
        return store.fits(key, value) and store.layout == self._stores.layout(key, value)

    def _append(self, store: KVStore, key: torch.Tensor, value: torch.Tensor) -> int:
        """Appends; returns how many of the newest rows this step's queries may see."""
        store.append(key, value)
        return store.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.store is None else self.store.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forgets the rows, keeps the memory."""
        if self.store is not None:
            self.store.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest rows: `-n` forgets n, 0 none; a positive number is the rows to keep
        (transformers' older meaning).
        """
        self.truncate(length_after_crop(self.get_seq_length(), tokens_to_remove))

    def check_truncate(self, length: int) -> None:
        """Raises what `truncate` would raise."""

    def truncate(self, length: int) -> None:
        """Forgets the newest rows, so that `length` tokens stay."""
        if self.store is not None:
            self.store.truncate(length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.get_seq_length() > 0 and self.store is not None:
            self.store.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.get_seq_length() > 0 and self.store is not None:
            self.store.select(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0 and self.store is not None:
            self.store.select(repeated(self.store.batch_size, repeats))

    def offload(self) -> None:
        raise NotImplementedError("BMCCache: offloading is not supported; allowed: False")

    def prefetch(self) -> None:
        raise NotImplementedError("BMCCache: offloading is not supported; allowed: False")


class BMCSlidingLayer(BMCLayer):
    """A layer whose queries see `sliding_window` rows: older ones are dropped, not grown over.

    The store may hold more rows than the window; what a step gets is exactly what transformers'
    sliding layer would return.
    """

    is_sliding = True

    def __init__(self, stores: StoreMaker, sliding_window: int) -> None:
        super().__init__(stores)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False
        # Tokens that a crop may go back to: rows that those need are kept.
        self._safe_length = 0

    def activate_past_recording(self) -> None:
        """From now on rows are dropped only after `crop`: everything since it can be undone."""
        self.record_past = True
        self._safe_length = self.cumulative_length

    def _append(self, store: KVStore, key: torch.Tensor, value: torch.Tensor) -> int:
        if not self.record_past:
            self._safe_length = self.cumulative_length
        newer = self.cumulative_length - self._safe_length
        visible, _ = self.get_mask_sizes(key.shape[2])
        store.append(key, value, keep=self.sliding_window - 1 + newer)
        self.cumulative_length += key.shape[2]
        return visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        before = min(self.cumulative_length, self.sliding_window - 1)
        return before + query_length, self.cumulative_length - before

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.sliding_window

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0
        self._safe_length = 0

    def check_truncate(self, length: int) -> None:
        """Raises RuntimeError where rows that the next step would see were dropped already."""
        # Without tokens there is nothing before the next step.
        if length and max(0, length - self.sliding_window + 1) < self._first_held():
            raise RuntimeError(
                f"crop to {length} tokens: the window of {self.sliding_window} rows before it was "
                "dropped already. Call activate_past_recording before the rows that are to be "
                "undone."
            )

    def truncate(self, length: int) -> None:
        self.check_truncate(length)
        super().truncate(max(0, length - self._first_held()))
        self.cumulative_length = length
        self._safe_length = length

    def _first_held(self) -> int:
        return self.cumulative_length - (0 if self.store is None else self.store.length)


def length_after_crop(length: int, tokens_to_remove: int) -> int:
    """What `crop` leaves of `length` tokens."""
    if tokens_to_remove > 0:
        return min(length, tokens_to_remove)
    return max(0, length + tokens_to_remove)


def repeated(batch: int, repeats: int) -> torch.Tensor:
    """Indices that repeat each sequence `repeats` times."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: expected a positive number")
    return torch.arange(batch).repeat_interleave(repeats)
