"""The layout "packed": K and V as the native attention kernel reads them (docs/kernel.md).

One tensor `[batch, heads, capacity, 2 * head size]`, the paged cache with one block per sequence:
inside a (sequence, head), K in transposed tiles of 16 rows, then V in packs of P rows:

    K: [capacity/16][D/P][16][P]     V: [capacity/P][D][P]     P = 2 for bfloat16, else 1

Both parts are linear in tiles of 16 rows, so growing and sliding copy two plain ranges.

The tensor begins a stretch of memory that may be longer: addresses without pages, which take no
memory until they are written. A growth that fits into it moves the rows up where they are: without
new pages, which the system must clear and a virtual machine's host must find, it is three times as
fast and more, and nothing exists twice.
"""

from __future__ import annotations

import torch

from bmc_core import native
from bmc_core.attention import (
    BLOCK_ROWS,
    DTYPES,
    HEAD_SIZES,
    paged_attention,
    write_kv,
)
from bmc_core.kv_store.base import KVStore
from bmc_core.kv_store.counters import KVCounters
from bmc_core.kv_store.moves import move_to_front
from bmc_core.kv_store.tables import StepTables
from bmc_core.kv_store.tensors import new_tensor
from bmc_core.machine.memory import PIECE, discard
from bmc_core.policy import GrowthPolicy

WORTH_OTHER_PAGES = 16 << 20
"""Bytes from which rows move elsewhere to be on huge pages, or to be on small ones."""


def why_not_packed(key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the native kernel cannot hold such rows `[batch, heads, rows, size]`; None: it can."""
    if key.device.type != "cpu" or value.device.type != "cpu":
        return f"K and V are on {key.device}, not on the CPU"
    if key.dtype not in DTYPES or value.dtype != key.dtype:
        return f"K is {key.dtype} and V is {value.dtype}; the kernel takes {DTYPES}"
    if key.shape[3] != value.shape[3]:
        return f"K and V differ in head size ({key.shape[3]} and {value.shape[3]})"
    if key.shape[3] not in HEAD_SIZES:
        return f"the head size is {key.shape[3]}; the kernel takes 32 to 256 in steps of 16"
    return None


class PackedStore(KVStore):
    """K and V in one tensor, read and written by the native kernel.

    Args:
        tables: shared by the stores of one cache; None: its own.
    """

    layout = "packed"
    row_multiple = BLOCK_ROWS

    _kv: torch.Tensor | None = None
    _on_huge_pages = False

    def __init__(
        self,
        policy: GrowthPolicy,
        *,
        limit: int | None = None,
        counters: KVCounters | None = None,
        tables: StepTables | None = None,
    ) -> None:
        super().__init__(policy, limit=limit, counters=counters)
        self.tables = tables if tables is not None else StepTables()

    def fits(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        kv = self._kv
        return (
            kv is not None
            and key.dim() == 4
            and key.shape == value.shape
            and key.shape[0] == kv.shape[0]
            and key.shape[1] == kv.shape[1]
            and 2 * key.shape[3] == kv.shape[3]
            and key.dtype == kv.dtype == value.dtype
            and key.device == kv.device == value.device
        )

    def keys(self) -> torch.Tensor:
        """A copy, `[batch, heads, length, head size]`: for fallbacks and for looking."""
        return self.newest_keys(self.length)

    def values(self) -> torch.Tensor:
        """A copy, `[batch, heads, length, head size]`: for fallbacks and for looking."""
        return self.newest_values(self.length)

    def newest_keys(self, rows: int) -> torch.Tensor:
        """A copy of the newest `rows` valid keys."""
        kv = self.tensor()
        batch, heads, _, width = kv.shape
        pack, held = self._pack(), self._rounded(self.length)
        shape = (batch, heads, held // BLOCK_ROWS, width // 2 // pack, BLOCK_ROWS, pack)
        # [tile][D/P][16][P] -> [tile][16][D/P][P]
        plain = self._part(0).view(shape).transpose(3, 4).reshape(batch, heads, held, width // 2)
        return plain.narrow(2, self.length - rows, rows)

    def newest_values(self, rows: int) -> torch.Tensor:
        """A copy of the newest `rows` valid values."""
        kv = self.tensor()
        batch, heads, _, width = kv.shape
        pack, held = self._pack(), self._rounded(self.length)
        packs = self._part(1).view(batch, heads, held // pack, width // 2, pack)
        # [rows/P][D][P] -> [rows/P][P][D]
        plain = packs.transpose(3, 4).reshape(batch, heads, held, width // 2)
        return plain.narrow(2, self.length - rows, rows).clone()

    @property
    def has_shape(self) -> bool:
        return self._kv is not None

    @property
    def batch_size(self) -> int:
        return 0 if self._kv is None else self._kv.shape[0]

    @property
    def heads(self) -> int:
        return self.tensor().shape[1]

    @property
    def head_size(self) -> int:
        return self.tensor().shape[3] // 2

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor().dtype

    @property
    def row_bytes(self) -> int:
        kv = self.tensor()
        return kv.shape[0] * kv.shape[1] * kv.shape[3] * kv.element_size()

    @property
    def num_bytes(self) -> int:
        return 0 if self._kv is None else self._kv.nbytes

    def attend(
        self,
        query: torch.Tensor,
        *,
        scale: float,
        rows: int | None = None,
        first_rows: torch.Tensor | None = None,
        sliding_window: int | None = None,
        logits_soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query rows that stand at the end of the valid rows.

        Args:
            query: `[batch, query heads, query rows, head size]`, the store's dtype.
            rows: how many of the newest rows can be seen; None: all.
            first_rows: int32 `[batch]`, of those, how many at the beginning are seen by no query of
                that sequence (left padding).
            scale, sliding_window, logits_soft_cap, sinks: as in `paged_attention`.

        Returns:
            `[batch, query rows, query heads, head size]`, contiguous.

        Raises:
            TypeError, ValueError: as `paged_attention`.
        """
        kv = self.tensor()
        batch, heads, queries, size = query.shape
        hidden = 0 if rows is None else self.length - rows
        tables = self.tables
        out = torch.empty((batch * queries, heads, size), dtype=query.dtype)
        paged_attention(
            _token_rows(query),
            kv,
            tables.batch(
                batch, self.capacity, self.length, queries, hidden=hidden, first_rows=first_rows
            ),
            out,
            scale=scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
        )
        return out.view(batch, queries, heads, size)

    def tensor(self) -> torch.Tensor:
        if self._kv is None:
            raise RuntimeError("the KV store is empty: nothing was appended yet")
        return self._kv

    def _pack(self) -> int:
        return 2 if self.tensor().dtype == torch.bfloat16 else 1

    def _part(self, part: int, kv: torch.Tensor | None = None) -> torch.Tensor:
        """K (0) or V (1) of the tiles with valid rows: a view `[batch, heads, elements]`."""
        kv = self.tensor() if kv is None else kv
        batch, heads, capacity, width = kv.shape
        flat = kv.view(batch, heads, capacity * width)
        size = width // 2
        return flat.narrow(2, part * capacity * size, self._rounded(self.length) * size)

    def _start(self, key: torch.Tensor, value: torch.Tensor) -> None:
        reason = why_not_packed(key, value)
        if reason is not None:
            raise ValueError(f'layout "packed" is not possible: {reason}')
        self._kv = new_tensor((*key.shape[:2], 0, 2 * key.shape[3]), key, dense=False)

    def _release(self) -> None:
        self._kv = None

    def _hold(self, capacity: int, dropped: int, *, dense: bool) -> None:
        kv = self.tensor()
        if dropped == 0 and self._grow_in_place(capacity, dense):
            return
        batch, heads, old_capacity, width = kv.shape
        bigger = self._with_room((batch, heads, capacity, width), dense)
        self.counters.allocated(bigger.nbytes)
        # A few heads at a time: [heads of all sequences, elements of K, then of V]
        old = kv.view(batch * heads, old_capacity * width)
        new = bigger.view(batch * heads, capacity * width)
        size = width // 2
        begin, end = dropped * size, self._rounded(self.length) * size
        step = max(1, PIECE // max(1, old_capacity * width * kv.element_size()))
        for first in range(0, batch * heads, step):
            source, target = old[first : first + step], new[first : first + step]
            for start, old_start in ((0, 0), (capacity * size, old_capacity * size)):
                kept = source[:, old_start + begin : old_start + end]
                target[:, start : start + end - begin].copy_(kept)
            if kv.nbytes > PIECE:
                discard(source)  # nobody else has this memory: what leaves a store is a copy
        self._kv, self._on_huge_pages = bigger, dense
        self.counters.released(kv.nbytes)
        self.capacity = capacity

    def _with_room(self, shape: tuple[int, int, int, int], dense: bool) -> torch.Tensor:
        """A tensor of that shape, with addresses behind it for the rows that are expected, or for
        as many again."""
        kv = self.tensor()
        batch, heads, capacity, width = shape
        expected = 0 if self.limit is None else self._rounded(self.limit)
        for rows in [expected, 2 * capacity] if expected >= capacity else [2 * capacity]:
            try:
                return _resized(new_tensor((batch, heads, rows, width), kv, dense=dense), capacity)
            except RuntimeError:  # address space is scarce
                continue
        return new_tensor(shape, kv, dense=dense)

    def _grow_in_place(self, capacity: int, dense: bool) -> bool:
        """Holds `capacity` rows in the memory that is there; False: it cannot."""
        kv = self.tensor()
        parts = 2 * kv.shape[0] * kv.shape[1]  # K and V of each head
        part_bytes = self.head_size * kv.element_size()  # of a row
        room = kv.untyped_storage().nbytes()
        needed = capacity * self.row_bytes
        if capacity < self.capacity or needed > room:
            return False
        if dense != self._on_huge_pages and needed >= WORTH_OTHER_PAGES:
            return False
        try:
            native.module().grow_in_place(
                kv.data_ptr(),
                room,
                parts,
                self._rounded(self.length) * part_bytes,
                self.capacity * part_bytes,
                capacity * part_bytes,
            )
        except MemoryError as error:  # its buffer comes first: nothing has moved
            raise RuntimeError("can't allocate the buffer of a growth in place") from error
        self._kv, self.capacity = _resized(kv, capacity), capacity
        self.counters.allocated(needed - kv.nbytes)
        return True

    def _slide(self, dropped: int) -> None:
        parts = self._parts()
        move_to_front(parts, dropped * self.head_size, parts[0].shape[2])

    def _writable(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.resolve_neg()
        return rows if rows.stride(3) == 1 else rows.contiguous()

    def _prepare_write(
        self, key: torch.Tensor, value: torch.Tensor, first: int, capacity: int
    ) -> None:
        batch, _, rows, _ = key.shape
        self.tables.slots(batch, capacity, first, rows)  # kept there for `_write`
        # Negative slots are checked as all are, and not written.
        self._write_to(key, value, torch.full((batch * rows,), -1))

    def _write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        batch, _, rows, _ = key.shape
        slots = self.tables.slots(batch, self.capacity, self.length, rows)
        self._write_to(key, value, slots)

    def _write_to(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        kv = self.tensor()
        batch, _, rows, _ = key.shape
        if batch * rows == 0:
            return
        # One row: all sequences at once. More: sequence by sequence, which are views of any
        # strides, where all at once might need copies.
        step = batch if rows == 1 else 1
        for first in range(0, batch, step):
            write_kv(
                _token_rows(key[first : first + step]),
                _token_rows(value[first : first + step]),
                kv,
                slots[first * rows :],
            )

    def _gathered(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kv = self.tensor()
        dense = self._dense(self.length, self.capacity)
        result = new_tensor((indices.shape[0], *kv.shape[1:]), kv, dense=dense)
        for part in (0, 1):
            source, target = self._part(part), self._part(part, result)
            for index, taken in enumerate(indices.tolist()):
                target[index].copy_(source[taken])
        return (result,)

    def _adopt(self, tensors: tuple[torch.Tensor, ...]) -> None:
        (self._kv,) = tensors
        self._on_huge_pages = self._dense(self.length, self.capacity)

    def _parts(self) -> list[torch.Tensor]:
        return [self._part(0), self._part(1)]


def _resized(kv: torch.Tensor, capacity: int) -> torch.Tensor:
    """The beginning of a tensor's memory as `[batch, heads, capacity, width]`."""
    batch, heads, _, width = kv.shape
    strides = (heads * capacity * width, capacity * width, width, 1)
    with torch.inference_mode(False):
        return kv.as_strided((batch, heads, capacity, width), strides)


def _token_rows(rows: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, rows, size]` as `[batch * rows, heads, size]`, copied only if it must be:
    never where batch or rows is 1 and the last dimension is contiguous."""
    batch, heads, count, size = rows.shape
    tokens = rows.transpose(1, 2).reshape(batch * count, heads, size)
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()
