"""Decode attention over the block tables of a worn pool, against the same rows in one stretch each.

Promises the same lengths, the same kernel and the same memory for all tables, and that they take
turns. Knows nothing of who made the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.lib.timing import Timed, alternate
from bmc_core.attention import AttentionBatch, paged_attention
from bmc_core.machine.memory import available_bytes, prefer_huge_pages

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
DTYPE = torch.bfloat16
LAYER_BYTES = 2 << 30
"""Of all layers together: more than most L3 caches hold."""
ROW_BYTES = KV_HEADS * HEAD_SIZE * 2 * DTYPE.itemsize


class Tables(NamedTuple):
    """Of the requests that ran when somebody looked.

    Attributes:
        blocks: ids of each request's blocks.
        rows: of each request that hold a token.
        block_size: rows.
        num_blocks: of the pool.
    """

    blocks: list[list[int]]
    rows: list[int]
    block_size: int
    num_blocks: int

    def in_stretches(self) -> Tables:
        """The same requests in a pool that nobody has used: one behind the other."""
        ids, first = [], 1
        for blocks in self.blocks:
            ids.append(list(range(first, first + len(blocks))))
            first += len(blocks)
        return self._replace(blocks=ids)


class _Attend(Timed):
    """One decode step of a layer over the tables; layers are the rotating sets."""

    def __init__(self, tables: Tables, layers: list[torch.Tensor]) -> None:
        self.threads = torch.get_num_threads()
        count = len(tables.rows)
        width = max(map(len, tables.blocks))
        table = torch.zeros((count, width), dtype=torch.int32)
        for place, blocks in enumerate(tables.blocks):
            table[place, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        # As vLLM lays the pool out for BMC: a head's rows in blocks side by side are one stretch.
        size = tables.num_blocks * tables.block_size * KV_HEADS * 2 * HEAD_SIZE
        shape = (KV_HEADS, tables.num_blocks, tables.block_size, 2 * HEAD_SIZE)
        self._layers = [layer[:size].view(shape).permute(1, 0, 2, 3) for layer in layers]
        lengths = torch.tensor(tables.rows, dtype=torch.int32)
        starts = torch.arange(count + 1, dtype=torch.int32)
        self._batch = AttentionBatch(starts, lengths, table, tables.block_size)
        self._query = torch.zeros((count, HEADS, HEAD_SIZE), dtype=DTYPE)
        self._out = torch.empty_like(self._query)

    def enter(self) -> None:
        pass

    def call(self, index: int) -> None:
        cache = self._layers[index % len(self._layers)]
        paged_attention(self._query, cache, self._batch, self._out, scale=HEAD_SIZE**-0.5)


def slower(tables: Sequence[Tables], seconds: float) -> list[float]:
    """How many times as long attention takes over each as over stretches.

    Args:
        tables: of one load.
        seconds: for all of them together.
    """
    rows = max(one.num_blocks * one.block_size for one in tables)
    count = max(1, min(LAYER_BYTES, available_bytes() // 4) // (rows * ROW_BYTES))
    memory = torch.empty(count * rows * KV_HEADS * 2 * HEAD_SIZE, dtype=DTYPE)
    prefer_huge_pages(memory)
    layers = list(memory.fill_(0.5).view(count, -1))  # written to: else it is one page of zeros
    pairs = [(_Attend(one, layers), _Attend(one.in_stretches(), layers)) for one in tables]
    timings = alternate([trial for pair in pairs for trial in pair], seconds, min_rounds=9)
    return [worn.ms / stretch.ms for worn, stretch in zip(timings[::2], timings[1::2], strict=True)]
