"""Measures what growing, reading and computing cost on this machine.

Promises figures of the real parts: growths of `bmc_core.kv_store`, attention of the native kernel
and of torch's sdpa, linear layers of torch. Sets of K and V rotate as the layers of a model do:
growths over as many as the model has layers, attention once over `NEAR_BYTES` (about what caches
hold) and once over `MAX_BYTES`. On a machine with a very large L3 both may fit into it, as the K
and V of a real generation may. Each figure is the lower quartile of its calls, so that what other
processes took is mostly left out. Knows nothing of files and of what the figures are for.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from bmc_core.costs.geometry import Geometry
from bmc_core.kv_store import KVStore, PackedStore, RowsStore, why_not_packed
from bmc_core.machine.memory import available_bytes
from bmc_core.policy import BMCPolicy

MIB = 1 << 20
MAX_BYTES = 96 * MIB
"""Of a working set; less where memory is scarce."""
NEAR_BYTES = 12 * MIB
MAX_SETS = 24
WEIGHT_BYTES = 32 * MIB

# K and V of one layer. Around 64 MiB (two tensors) glibc stops reusing freed memory and asks the
# system for fresh, zeroed pages: points on both sides of that step.
GROWTH_BYTES = {
    "rows": (MIB // 4, 2 * MIB, 8 * MIB, 24 * MIB, 60 * MIB, 68 * MIB, 96 * MIB),
    "packed": (MIB // 4, 2 * MIB, 8 * MIB, 32 * MIB, 64 * MIB, 96 * MIB),
}
STEP_ROWS = (1, 2, 4, 8, 16)
ATTENTION_ROWS = (256, 2048)
_SPARE = 16
MIN_LAYER_ROWS = 3 * 2 * 2 * ATTENTION_ROWS[0]
"""Rows of one layer that exist at the same time at least: three lengths of attention, two sets of
each, with as many spare rows."""


class AttentionCost(NamedTuple):
    """One layer's attention of one query row per sequence: `call` seconds, and seconds per byte of
    valid and of padded K and V."""

    call: float
    valid: float
    padding: float


Progress = Callable[[str, float], None]
"""Is told what is measured now, and the fraction that is done."""


def lower_quartile(seconds: Sequence[float]) -> float:
    """Of at least one value."""
    if len(seconds) < 2:
        return seconds[0]
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def timed(calls: Sequence[Callable[[], object]], budget: float, rounds: int = 3) -> list[float]:
    """Lower quartiles of calls that take turns, for `budget` seconds and at least `rounds` rounds,
    after one that is not timed."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + budget
    while len(samples[0]) < rounds or time.perf_counter() < end:
        for call, taken in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [lower_quartile(taken) for taken in samples]


def most_bytes() -> int:
    """The largest working set here."""
    return max(MIB, min(MAX_BYTES, available_bytes() // 8))


def _batch_of(rows: int) -> int:
    """Sequences for so many rows in all: no sequence becomes absurdly long."""
    return min(64, max(1, rows // 8192))


def _rows(geometry: Geometry, batch: int, rows: int) -> torch.Tensor:
    """K or V `[batch, kv heads, rows, head size]`, drawn."""
    shape = (batch, geometry.num_kv_heads, rows, geometry.head_size)
    row = torch.randn(shape[1], 64, shape[3]).to(geometry.dtype)
    return row.repeat(1, -(-rows // 64), 1)[:, :rows].expand(shape)


def why_not_native(geometry: Geometry) -> str | None:
    """Why the native kernel cannot serve this geometry here; None: it can."""
    from bmc_core import native

    if native.load_error() is not None:
        return native.load_error()
    row = torch.empty(1, geometry.num_kv_heads, 1, geometry.head_size, dtype=geometry.dtype)
    return why_not_packed(row, row)


def growth_points(
    geometry: Geometry, layout: str, budget: float
) -> tuple[tuple[float, float], ...]:
    """(bytes of valid K and V copied, seconds) of one layer's growth.

    A growth is what an append to a full store takes beyond an append to one with room: allocate,
    copy, release. The stores of several layers take turns.
    """
    _use_memory(4 * most_bytes())
    make: type[KVStore] = RowsStore if layout == "rows" else PackedStore
    most = most_bytes()
    sizes = [size for size in GROWTH_BYTES[layout] if size <= most]
    points: list[tuple[float, float]] = []
    for size in sizes:
        found = _growth_point(make, geometry, size, budget / len(sizes))
        if not points or found[0] > points[-1][0]:
            points.append(found)
    return tuple(points)


def _use_memory(num_bytes: int) -> None:
    """Writes fresh memory and frees it. On a virtual machine the first use of a page may wait for
    the host (0.7 GB/s were seen); the growths of a model that has run for a while do not."""
    torch.empty(num_bytes, dtype=torch.uint8).fill_(1)


def _growth_point(
    make: type[KVStore], geometry: Geometry, size: int, budget: float
) -> tuple[float, float]:
    rows = max(_SPARE, size // geometry.layer_row_bytes)
    batch = _batch_of(rows)
    rows = max(_SPARE, rows // batch // _SPARE * _SPARE)
    held = _rows(geometry, batch, rows)
    new = _rows(geometry, batch, _SPARE).contiguous()
    count = max(2, min(geometry.num_layers, MAX_SETS, most_bytes() // size))
    stores = [make(BMCPolicy(r=2 * _SPARE)) for _ in range(count)]
    growing: list[float] = []
    writing: list[float] = []
    copied: list[int] = []
    end = time.perf_counter() + budget
    while len(growing) < 8 or time.perf_counter() < end:
        for store in stores:
            if not rows <= store.length <= rows + rows // 8 + 4 * _SPARE:
                store.release()
                store.append(held, held)
            while store.length < store.capacity:
                store.append(new, new)
            copied.append(store.length)
            # The first append finds the store full, the second one finds room.
            for taken in (growing, writing):
                start = time.perf_counter()
                store.append(new, new)
                taken.append(time.perf_counter() - start)
    # The smallest: what comes on top is the host's (see `_use_memory`) or a neighbor's.
    seconds = min(growing) - min(writing)
    return float(stores[0].row_bytes * statistics.mean(copied)), max(seconds, 1e-7)


def attention_costs(
    geometry: Geometry, path: str, budget: float, working_bytes: int
) -> AttentionCost:
    """What one layer's decode attention costs on a path, from its time at two lengths.

    Args:
        path: "native": the packed store's kernel; "sdpa": torch's, over views of the valid rows;
            "padded": torch's, over all rows that are held, with a mask. Grouped heads are handled
            as transformers does: by sdpa itself without a mask, repeated in memory with one.
        working_bytes: of the sets that rotate, spare rows included.
    """
    short, long = ATTENTION_ROWS
    while long > 256 and long * geometry.layer_row_bytes > working_bytes // 8:
        short, long = short // 2, long // 2
    batch = max(1, min(8, working_bytes // (12 * long * geometry.layer_row_bytes)))
    query = torch.randn(batch, geometry.num_query_heads, 1, geometry.head_size).to(geometry.dtype)
    make = _native_call if path == "native" else _sdpa_call
    spare = 2 * long
    lengths = [(short, short), (long, long), (long, spare)]
    layer = batch * geometry.layer_row_bytes * spare
    sets = max(2, min(MAX_SETS, working_bytes // layer))
    calls = [
        _Rotating([make(geometry, batch, query, rows, held, path) for _ in range(sets)])
        for rows, held in lengths
    ]
    few, many, padded = timed(calls, budget, rounds=max(4, sets))
    per_row = batch * geometry.layer_row_bytes
    valid = (many - few) / ((long - short) * per_row)
    if valid <= 0.0:  # other processes took more than the rows did
        valid = many / (long * per_row)
    padding = max(0.0, (padded - many) / ((spare - long) * per_row))
    return AttentionCost(max(0.0, few - valid * short * per_row), valid, padding)


class _Rotating:
    """Calls its sets in turn."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = calls
        self.place = 0

    def __call__(self) -> None:
        self.calls[self.place]()
        self.place = (self.place + 1) % len(self.calls)


def _native_call(
    geometry: Geometry, batch: int, query: torch.Tensor, rows: int, held: int, path: str
) -> Callable[[], object]:
    store = PackedStore(BMCPolicy(r=held))
    key = _rows(geometry, batch, rows)
    store.append(key, key)
    scale = geometry.head_size**-0.5
    return lambda: store.attend(query, scale=scale)


def _sdpa_call(
    geometry: Geometry, batch: int, query: torch.Tensor, rows: int, held: int, path: str
) -> Callable[[], object]:
    store = RowsStore(BMCPolicy(r=held))
    key = _rows(geometry, batch, held)
    store.append(key, key)
    groups = geometry.num_query_heads // geometry.num_kv_heads
    if path == "sdpa":
        store.truncate(rows)
        key, value = store.keys(), store.values()
        return lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=groups > 1)
    key, value = store.keys(), store.values()
    mask = (torch.arange(held) < rows).expand(batch, 1, 1, held)

    def masked() -> None:
        k, v = key, value
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        F.scaled_dot_product_attention(query, k, v, attn_mask=mask)

    return masked


def step_points(geometry: Geometry, budget: float) -> tuple[tuple[int, float], ...]:
    """(rows of the batch, seconds) of all linear layers of a step, the vocabulary's left out.

    Times one square matrix, the hidden size wide (at most 4096), out of a rotating set, and scales
    it to the weights of a layer with four attention projections and a gated feed-forward.
    """
    width = min(4096, geometry.hidden_size)
    matrix_bytes = width * width * geometry.dtype.itemsize
    sets = max(2, min(MAX_SETS, WEIGHT_BYTES // matrix_bytes))
    weights = [torch.full((width, width), 0.01, dtype=geometry.dtype) for _ in range(sets)]
    calls = []
    for rows in STEP_ROWS:
        inputs = torch.ones(rows, width, dtype=geometry.dtype)
        calls.append(
            _Rotating([lambda x=inputs, w=weight: F.linear(x, w) for weight in weights])  # type: ignore[misc]
        )
    seconds = timed(calls, budget, rounds=4)
    attention = geometry.head_size * (2 * geometry.num_query_heads + 2 * geometry.num_kv_heads)
    layer = geometry.hidden_size * (attention + 3 * geometry.intermediate_size)
    factor = geometry.num_layers * layer / width**2
    return tuple((rows, factor * value) for rows, value in zip(STEP_ROWS, seconds, strict=True))


class Measured(NamedTuple):
    """All figures. Curves are (bytes or rows, seconds); attention is over `NEAR_BYTES` and over
    `MAX_BYTES` of K and V. The native ones are None where the kernel cannot serve the geometry."""

    growth_rows: tuple[tuple[float, float], ...]
    growth_packed: tuple[tuple[float, float], ...] | None
    sdpa: tuple[AttentionCost, AttentionCost]
    padded: tuple[AttentionCost, AttentionCost]
    native: tuple[AttentionCost, AttentionCost] | None
    steps: tuple[tuple[int, float], ...]


def _nobody(text: str, fraction: float) -> None:
    pass


def near_and_far(
    geometry: Geometry, path: str, budget: float
) -> tuple[AttentionCost, AttentionCost]:
    """`attention_costs` of a small and of a large working set."""
    most = most_bytes()
    near = attention_costs(geometry, path, budget / 2, min(NEAR_BYTES, most))
    return near, attention_costs(geometry, path, budget / 2, most)


def _require_memory(geometry: Geometry) -> None:
    """Sets become smaller where memory is scarce, but not below some thousand rows of a layer."""
    needed, free = MIN_LAYER_ROWS * geometry.layer_row_bytes, available_bytes()
    if needed > free // 2:
        raise RuntimeError(
            f"measuring {geometry.num_kv_heads} KV heads of {geometry.head_size} takes about "
            f"{needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free, of which half may be used"
        )


def measure(geometry: Geometry, *, seconds: float = 5.0, progress: Progress = _nobody) -> Measured:
    """Measures everything on torch's current number of threads.

    Args:
        seconds: time budget of what is timed; making the data comes on top.
        progress: is told the progress.
    """
    _require_memory(geometry)
    packed = why_not_native(geometry) is None
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            progress("growth, plain rows", 0.0)
            rows = growth_points(geometry, "rows", 0.23 * seconds)
            progress("growth, packed rows", 0.3)
            packed_points = growth_points(geometry, "packed", 0.23 * seconds) if packed else None
            progress("attention, sdpa", 0.6)
            sdpa = near_and_far(geometry, "sdpa", 0.14 * seconds)
            progress("attention, sdpa over padding", 0.7)
            padded = near_and_far(geometry, "padded", 0.14 * seconds)
            progress("attention, native kernel", 0.8)
            native = near_and_far(geometry, "native", 0.14 * seconds) if packed else None
            progress("linear layers", 0.9)
            steps = step_points(geometry, 0.12 * seconds)
    finally:
        if collecting:
            gc.enable()
    progress("done", 1.0)
    return Measured(rows, packed_points, sdpa, padded, native, steps)
