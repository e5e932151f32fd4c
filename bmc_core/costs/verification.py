"""What attention of several query rows costs over the same context: one for each draft token.

Promises that the kernel itself is timed, over more K and V than caches near the core hold. Heads
that share K and V are counted as they are, so that with grouped queries further rows stop being
free early. Knows nothing of models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from bmc_core.attention import BLOCK_ROWS, AttentionBatch, paged_attention
from bmc_core.machine.cpu import l3_bytes
from bmc_core.machine.memory import available_bytes, prefer_huge_pages

SEQUENCES = 4
ROUNDS = 3
MOST_BYTES = 256 << 20


def seconds_per_row(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    query_rows: Sequence[int],
    *,
    seconds: float = 0.5,
    most: int | None = None,
) -> dict[int, float]:
    """Seconds of one layer's attention per context row of a sequence, by its query rows.

    Args:
        num_heads, num_kv_heads, head_size, dtype: of the layer's cache, any that the kernel takes.
        query_rows: rows of a sequence that attend at the same time, each at least 1.
        seconds: time budget; one round is timed in any case, and at most `ROUNDS`.
        most: bytes of the cache; None: twice the L3 cache where memory allows, at most 256 MiB.

    Raises:
        ValueError, TypeError: the kernel does not take such a cache.
        MemoryError, RuntimeError: there is no memory to measure with.
    """
    row_bytes = num_kv_heads * head_size * 2 * dtype.itemsize
    longest = max(query_rows)
    rows = max(2 * longest, (most or _most_bytes()) // row_bytes // SEQUENCES)
    blocks = -(-rows // BLOCK_ROWS)
    rows = blocks * BLOCK_ROWS
    memory = torch.empty(
        num_kv_heads * SEQUENCES * blocks * BLOCK_ROWS * 2 * head_size, dtype=dtype
    )
    prefer_huge_pages(memory)
    memory.view(torch.uint8).fill_(0x3C)  # memory that was never written is one page of zeros
    shape = (num_kv_heads, SEQUENCES * blocks, BLOCK_ROWS, 2 * head_size)
    cache = memory.view(shape).permute(1, 0, 2, 3)
    table = torch.arange(SEQUENCES * blocks, dtype=torch.int32).reshape(SEQUENCES, blocks)
    lengths = torch.full((SEQUENCES,), rows, dtype=torch.int32)
    computed = dtype if dtype.itemsize > 1 else torch.bfloat16
    query = torch.zeros((SEQUENCES * longest, num_heads, head_size), dtype=computed)
    out = torch.empty_like(query)
    found: dict[int, float] = {}
    end = time.perf_counter() + seconds
    for done in range(1 + ROUNDS):
        for count in query_rows:
            # The first round makes plans and wakes memory; later ones go by the clock.
            if done > 1 and time.perf_counter() > end:
                break
            starts = torch.arange(SEQUENCES + 1, dtype=torch.int32) * count
            batch = AttentionBatch(starts, lengths, table, BLOCK_ROWS)
            tokens = SEQUENCES * count
            start = time.perf_counter()
            paged_attention(query[:tokens], cache, batch, out[:tokens], scale=head_size**-0.5)
            taken = (time.perf_counter() - start) / (SEQUENCES * rows)
            if done:
                found[count] = min(taken, found.get(count, taken))
    return found


def _most_bytes() -> int:
    wanted = max(64 << 20, 2 * (l3_bytes() or 0))
    return max(1 << 20, min(wanted, MOST_BYTES, available_bytes() // 8))
