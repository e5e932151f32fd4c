"""torch's `scaled_dot_product_attention` on a plain contiguous cache, `[B, H, rows, D]`.

Sequences of one length share a call; the mask and the layout of the queries are made before the
timed call, which favors it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from benchmarks.kernel.cases import Case
from benchmarks.kernel.inputs import Inputs
from benchmarks.kernel.operators.base import Arena, Operator, Trial, rows_to_load


class Sdpa(Operator):
    """`torch.nn.functional.scaled_dot_product_attention`, grouped-query heads by `enable_gqa`."""

    name = "sdpa"
    title = "sdpa"
    isa = "torch's choice"

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def close(self) -> None:
        self.arena.release()

    def refusal(self, case: Case) -> str | None:
        if case.run_rows or case.table_factor > 1 or case.block_size:
            return "has no blocks"
        if case.cache:
            return "has no quantized cache"
        return None

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Trial:
        return _SdpaTrial(case, inputs, threads, self.arena)


class _Part:
    """The sequences of one length: where their K, V and queries are."""

    def __init__(self, rows: int, count: int, members: list[int]) -> None:
        self.rows = rows
        self.count = count
        self.members = members
        self.mask: torch.Tensor | None = None
        if count > 1 and count != rows:
            self.mask = torch.ones(count, rows, dtype=torch.bool).tril(rows - count)


class _SdpaTrial(Trial):
    def __init__(self, case: Case, inputs: Inputs, threads: int, arena: Arena) -> None:
        super().__init__(case, inputs, threads)
        groups: dict[tuple[int, int], list[int]] = {}
        for seq, lens in enumerate(zip(case.seq_lens, case.query_lens, strict=True)):
            groups.setdefault(lens, []).append(seq)
        self.parts = [_Part(rows, count, seqs) for (rows, count), seqs in groups.items()]
        size = 2 * sum(case.seq_lens) * case.kv_heads * case.head_size
        self.flat = arena.sets((size,), inputs.query.dtype, case.set_bytes)
        self.sets = len(self.flat)
        self.caches = [self._views(memory) for memory in self.flat]
        self.queries = [
            self._by_sequence(inputs.query, case.query_lens, part) for part in self.parts
        ]
        key, value = inputs.key[inputs.last_rows], inputs.value[inputs.last_rows]
        self.new_rows = [
            tuple(self._by_sequence(x, case.query_lens, part) for x in (key, value))
            for part in self.parts
        ]
        self.outs: list[torch.Tensor] = []

    def _views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """K and V of each part: `[2, B, KV heads, rows, head size]`."""
        case, views, first = self.case, [], 0
        for part in self.parts:
            shape = (2, len(part.members), case.kv_heads, part.rows, case.head_size)
            size = torch.Size(shape).numel()
            views.append(memory[first : first + size].view(shape))
            first += size
        return views

    @staticmethod
    def _by_sequence(rows: torch.Tensor, lens: tuple[int, ...], part: _Part) -> torch.Tensor:
        """`[tokens, heads, head size]` -> the part's `[B, heads, tokens, head size]`."""
        pieces = rows.split(list(lens))
        return torch.stack([pieces[seq].transpose(0, 1) for seq in part.members])

    def load(self) -> None:
        for kind, rows in enumerate(rows_to_load(self.inputs)):
            for part, cache in zip(self.parts, self.caches[0], strict=True):
                cache[kind].copy_(self._by_sequence(rows, self.case.seq_lens, part))

    def replicate(self) -> None:
        for memory in self.flat[1:]:
            memory.copy_(self.flat[0])

    def attend(self, number: int) -> None:
        self.outs = [
            functional.scaled_dot_product_attention(
                query,
                cache[0],
                cache[1],
                attn_mask=part.mask,
                is_causal=part.count > 1 and part.mask is None,
                scale=self.inputs.scale,
                enable_gqa=self.case.query_heads != self.case.kv_heads,
            )
            for part, query, cache in zip(
                self.parts, self.queries, self.caches[number], strict=True
            )
        ]

    def write(self, number: int) -> None:
        for part, new, cache in zip(self.parts, self.new_rows, self.caches[number], strict=True):
            cache[0, :, :, part.rows - part.count :] = new[0]
            cache[1, :, :, part.rows - part.count :] = new[1]

    def poison(self) -> None:
        for out in self.outs:
            out.fill_(float("nan"))
        self.outs = []  # every call allocates its output

    def output(self) -> torch.Tensor:
        pieces: dict[int, torch.Tensor] = {}
        for part, out in zip(self.parts, self.outs, strict=True):
            for place, seq in enumerate(part.members):
                pieces[seq] = out[place].transpose(0, 1)
        return torch.cat([pieces[seq] for seq in sorted(pieces)])
