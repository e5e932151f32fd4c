"""How fast attention reads rows that lie in pieces, and the smallest piece that is fast enough.

In a paged cache nothing is copied when a request grows, so that r has another price: rows that
lie side by side are read faster. Promises that decode attention itself is timed, over twice what
the L3 cache holds where memory allows (at most 1 GiB), with pieces in a random order, all sizes in
turns. Knows nothing of block managers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from bmc_core.attention import BLOCK_ROWS, AttentionBatch, paged_attention
from bmc_core.machine.cpu import l3_bytes
from bmc_core.machine.memory import available_bytes, prefer_huge_pages

PIECES = (32, 64, 128, 256, 512, 1024)
"""Rows of a piece."""
TOLERANCE = 0.03
"""A piece is fast enough that is read at most 3 % slower than one stretch."""
SEQUENCES = 8
MIN_ROUNDS = 5


def piece_seconds(
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    *,
    num_heads: int | None = None,
    seconds: float = 2.0,
    most: int | None = None,
) -> dict[int, float]:
    """Seconds of decode attention per KV row, by the rows of a piece; key 0: one stretch.

    Args:
        num_kv_heads, head_size, dtype: of a layer's cache, any that the kernel takes.
        num_heads: query heads; None: as many.
        seconds: time budget; `MIN_ROUNDS` rounds are timed in any case.
        most: bytes of the cache; None: twice the L3 cache where memory allows.

    Raises:
        ValueError, TypeError: the kernel does not take such a cache.
        MemoryError, RuntimeError: there is no memory to measure with.
    """
    row_bytes = num_kv_heads * head_size * 2 * dtype.itemsize
    rows = max(PIECES[-1], (most or _most_bytes()) // row_bytes // SEQUENCES)
    rows -= rows % PIECES[-1]
    blocks = SEQUENCES * rows // BLOCK_ROWS
    # As vLLM lays its pool out for BMC: the rows of a head side by side, on huge pages. Written to,
    # since memory that never was is one page of zeros.
    memory = torch.empty(num_kv_heads * blocks * BLOCK_ROWS * 2 * head_size, dtype=dtype)
    prefer_huge_pages(memory)
    memory.view(torch.uint8).fill_(0x3C)
    cache = memory.view(num_kv_heads, blocks, BLOCK_ROWS, 2 * head_size).permute(1, 0, 2, 3)
    computed = dtype if dtype.itemsize > 1 else torch.bfloat16
    query = torch.zeros((SEQUENCES, num_heads or num_kv_heads, head_size), dtype=computed)
    out = torch.empty_like(query)
    lengths = torch.full((SEQUENCES,), rows, dtype=torch.int32)
    starts = torch.arange(SEQUENCES + 1, dtype=torch.int32)
    batches = {
        piece: AttentionBatch(starts, lengths, _table(blocks, piece or rows), BLOCK_ROWS)
        for piece in (0, *PIECES)
    }
    found: dict[int, list[float]] = {piece: [] for piece in batches}
    begun = time.perf_counter()
    done = -1  # The first round makes plans, and wakes memory.
    while done < MIN_ROUNDS or time.perf_counter() - begun < seconds:
        for piece, batch in batches.items():
            start = time.perf_counter()
            paged_attention(query, cache, batch, out, scale=head_size**-0.5)
            if done >= 0:
                found[piece].append(time.perf_counter() - start)
        done += 1
    return {piece: statistics.median(times) / (SEQUENCES * rows) for piece, times in found.items()}


def _most_bytes() -> int:
    """Twice the L3 cache, but at most 1 GiB and an eighth of what is free."""
    wanted = max(96 << 20, 2 * (l3_bytes() or 0))
    return max(1 << 20, min(wanted, 1 << 30, available_bytes() // 8))


def _table(blocks: int, piece: int) -> torch.Tensor:
    """Block table, int32 `[SEQUENCES, ...]`, of pieces in a random order."""
    size = piece // BLOCK_ROWS
    order = torch.randperm(blocks // size, generator=torch.Generator().manual_seed(0))
    table = order[:, None] * size + torch.arange(size)
    return table.reshape(SEQUENCES, -1).to(torch.int32)


def smallest_fast(seconds: Mapping[int, float], tolerance: float = TOLERANCE) -> int:
    """Rows of the smallest piece that is read nearly as fast as the best of all.

    Args:
        seconds: of `piece_seconds`.
        tolerance: how much slower it may be.
    """
    best = min(seconds.values())
    return next((p for p in PIECES if seconds[p] <= (1 + tolerance) * best), PIECES[-1])
