"""Random inputs of a case, the paged layout of its rows, and the float32 answer.

Promises fresh numbers in every run and a reference that shares no code with any system. Knows
nothing of what is measured.
"""

from __future__ import annotations

import secrets
from functools import cached_property
from typing import NamedTuple

import torch

from benchmarks.kernel.cases import FP8_CACHES, Case

SCORES = 32 << 20
"""Scores that the reference holds at a time."""


class Layout(NamedTuple):
    """Where the rows of each sequence lie in a paged cache.

    Attributes:
        block_table: int32 `[sequences, width]`, 0 (the null block) past what is used.
        slots: int64 `[rows of all sequences]`, block id * block size + row in the block.
        num_blocks: blocks of the pool, the null block included.
    """

    block_table: torch.Tensor
    slots: torch.Tensor
    num_blocks: int


class Inputs:
    """Query, keys and values of one case, all sequences one after the other.

    Attributes:
        query: `[query rows, query heads, head size]`, dtype of the case.
        key, value: `[KV rows, KV heads, head size]`.
        query_start_loc: int32 `[sequences + 1]`.
        seq_lens: int32 `[sequences]`.
        scale: factor of the logits.
    """

    def __init__(self, case: Case, seed: int | None = None) -> None:
        self.seed = secrets.randbits(48) if seed is None else seed
        self.generator = torch.Generator().manual_seed(self.seed)
        self.case = case
        dtype = getattr(torch, case.dtype)
        rows = sum(case.seq_lens)

        def normal(count: int, heads: int) -> torch.Tensor:
            shape = (count, heads, case.head_size)
            return torch.randn(*shape, generator=self.generator).to(dtype)

        self.query = normal(sum(case.query_lens), case.query_heads)
        self.key = storable(case, normal(rows, case.kv_heads))
        self.value = storable(case, normal(rows, case.kv_heads))
        self.scale = case.head_size**-0.5
        self.query_start_loc = torch.tensor([0, *case.query_lens]).cumsum(0).to(torch.int32)
        self.seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32)

    @cached_property
    def last_rows(self) -> torch.Tensor:
        """int64 `[query rows]`: which rows of `key` the step's new tokens are."""
        ends = torch.tensor(self.case.seq_lens).cumsum(0).tolist()
        parts = [
            torch.arange(end - count, end)
            for end, count in zip(ends, self.case.query_lens, strict=True)
        ]
        return torch.cat(parts)

    @cached_property
    def reference(self) -> torch.Tensor:
        """float32 `[query rows, query heads, head size]`: causal attention by plain products."""
        case = self.case
        group = case.query_heads // case.kv_heads
        out = torch.empty(self.query.shape, dtype=torch.float32)
        starts = torch.tensor([0, *case.seq_lens]).cumsum(0).tolist()
        first = 0
        for seq, count in enumerate(case.query_lens):
            rows = case.seq_lens[seq]
            hidden = torch.arange(rows)[None, :] > torch.arange(rows - count, rows)[:, None]
            heads = max(1, SCORES // (group * count * rows))
            queries = self.query[first : first + count]
            for head in range(0, case.kv_heads, heads):
                part = slice(head, min(head + heads, case.kv_heads))
                # [KV rows, KV heads, D] -> [KV heads, 1, KV rows, D]
                key = self.key[starts[seq] : starts[seq + 1], part].float().transpose(0, 1)[:, None]
                value = self.value[starts[seq] : starts[seq + 1], part].float().transpose(0, 1)
                query_part = slice(part.start * group, part.stop * group)
                # [tokens, query heads, D] -> [KV heads, group, tokens, D]
                query = queries[:, query_part].float().transpose(0, 1)
                query = query.reshape(-1, group, count, case.head_size)
                logits = (query @ key.transpose(2, 3)) * self.scale
                logits.masked_fill_(hidden, float("-inf"))
                result = logits.softmax(-1) @ value[:, None]
                result = result.reshape(-1, count, case.head_size).transpose(0, 1)
                out[first : first + count, query_part] = result
            first += count
        return out


def storable(case: Case, rows: torch.Tensor) -> torch.Tensor:
    """`rows` as the case's cache can hold them exactly, so that the reference needs no rounding
    rule: systems differ in theirs, and what is timed is the attention."""
    if not case.cache:
        return rows
    return rows.to(getattr(torch, FP8_CACHES[case.cache])).to(rows.dtype)


def layout(case: Case, block_size: int, seed: int) -> Layout:
    """Blocks for the case's rows: in order, or in runs of `case.run_rows` rows, shuffled."""
    needed = [-(-rows // block_size) for rows in case.seq_lens]
    per_run = max(1, case.run_rows // block_size) if case.run_rows else 0
    # Whole runs are handed out to sequences, so a sequence's last run may stay partly unused.
    taken = [-(-count // per_run) * per_run if per_run else count for count in needed]
    total = sum(taken)
    if per_run:
        generator = torch.Generator().manual_seed(seed)
        runs = torch.randperm(total // per_run, generator=generator)
        order = (runs[:, None] * per_run + torch.arange(per_run)).flatten() + 1
    else:
        order = torch.arange(1, total + 1)
    table = torch.zeros(case.batch, max(needed) * case.table_factor, dtype=torch.int32)
    slots = []
    first = 0
    for seq, count in enumerate(needed):
        blocks = order[first : first + count]
        table[seq, :count] = blocks.to(torch.int32)
        rows = torch.arange(case.seq_lens[seq])
        slots.append(blocks[rows // block_size] * block_size + rows % block_size)
        first += taken[seq]
    return Layout(table, torch.cat(slots), total + 1)
