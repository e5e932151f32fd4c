"""What a cache did and holds, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bmc_core.kv_store import KVCounters
from bmc_transformers.layers import BMCLayer


@dataclass(frozen=True)
class CacheStats:
    """Counts over all layers since the cache was made.

    Rows are per sequence, summed over the layers; bytes are those of all sequences.

    Attributes:
        tokens: tokens per sequence. `layouts`: layers per layout.
        rows_held: valid rows. `rows_reserved`: rows that fit. `rows_spare`: the difference.
        growths: more memory for layers that were full. `copies`: times that held rows were moved.
        bytes_allocated: all that was ever asked for. `bytes_reserved`: what is held now.
        bytes_peak: the most that was held at one time, growths included.
    """

    tokens: int
    layouts: dict[str, int]
    rows_held: int
    rows_reserved: int
    rows_spare: int
    growths: int
    copies: int
    rows_copied: int
    bytes_copied: int
    bytes_allocated: int
    bytes_reserved: int
    bytes_peak: int

    def __str__(self) -> str:
        layouts = ", ".join(f"{count} {name}" for name, count in self.layouts.items()) or "none"
        lines = [f"{'layers':<16} {layouts}"]
        for name, value in asdict(self).items():
            if name == "layouts":
                continue
            shown = f"{value / 2**20:,.2f} MiB" if name.startswith("bytes_") else f"{value:,}"
            lines.append(f"{name.removeprefix('bytes_').replace('_', ' '):<16} {shown}")
        return "\n".join(lines)


def cache_stats(layers: Sequence[BMCLayer], counters: KVCounters) -> CacheStats:
    """The numbers of these layers, which share `counters`."""
    stores = [layer.store for layer in layers if layer.store is not None]
    layouts: dict[str, int] = {}
    for store in stores:
        layouts[store.layout] = layouts.get(store.layout, 0) + 1
    held = sum(store.length for store in stores)
    reserved = sum(store.capacity for store in stores)
    return CacheStats(
        tokens=max((layer.get_seq_length() for layer in layers), default=0),
        layouts=layouts,
        rows_held=held,
        rows_reserved=reserved,
        rows_spare=reserved - held,
        growths=counters.growths,
        copies=counters.copies,
        rows_copied=counters.rows_copied,
        bytes_copied=counters.bytes_copied,
        bytes_allocated=counters.bytes_allocated,
        bytes_reserved=counters.bytes_held,
        bytes_peak=counters.bytes_peak,
    )
