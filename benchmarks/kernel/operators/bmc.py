"""BMC: this project's attention operator."""

from __future__ import annotations

import torch

from benchmarks.kernel.cases import FP8_CACHES, Case
from benchmarks.kernel.inputs import Inputs, layout
from benchmarks.kernel.operators.base import Arena, Operator, Trial, Unusable, rows_to_load
from bmc_core import native
from bmc_core.attention import AttentionBatch, paged_attention, write_kv

BLOCK_SIZE = 32
"""Rows of a block where the case names none: what the vLLM plugin sets by itself."""


class BMC(Operator):
    """`bmc_core.attention` with the instruction set that `bmc_core.native` uses.

    Raises:
        Unusable: the native module does not load.
    """

    name = "bmc"
    title = "BMC"

    def __init__(self, arena: Arena) -> None:
        error = native.load_error()
        if error is not None:
            raise Unusable(f"BMC: {error}")
        self.arena = arena
        self.isa = native.isa()

    def close(self) -> None:
        self.arena.release()

    def refusal(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Trial:
        return _BMCTrial(case, inputs, threads, self.arena)


class _BMCTrial(Trial):
    def __init__(self, case: Case, inputs: Inputs, threads: int, arena: Arena) -> None:
        super().__init__(case, inputs, threads)
        self.block_size = case.block_size or BLOCK_SIZE
        self.layout = layout(case, self.block_size, inputs.seed)
        # As in the vLLM plugin's pool, each head's blocks lie one after the other.
        shape = (case.kv_heads, self.layout.num_blocks, self.block_size, 2 * case.head_size)
        fp8 = FP8_CACHES.get(case.cache)
        dtype = getattr(torch, fp8) if fp8 else inputs.query.dtype
        self.caches = [pool.transpose(0, 1) for pool in arena.sets(shape, dtype, case.set_bytes)]
        self.sets = len(self.caches)
        self.out = torch.empty_like(inputs.query)
        self.new_slots = self.layout.slots[inputs.last_rows]
        self.new_key = inputs.key[inputs.last_rows]
        self.new_value = inputs.value[inputs.last_rows]
        self.batch = self._batch()

    def _batch(self) -> AttentionBatch:
        return AttentionBatch(
            self.inputs.query_start_loc,
            self.inputs.seq_lens,
            self.layout.block_table,
            self.block_size,
        )

    def load(self) -> None:
        self.caches[0].view(torch.uint8).zero_()  # as an engine's pool begins
        write_kv(*rows_to_load(self.inputs), self.caches[0], self.layout.slots)

    def replicate(self) -> None:
        for cache in self.caches[1:]:
            cache.copy_(self.caches[0])

    def attend(self, number: int) -> None:
        batch = self._batch() if self.case.planning else self.batch
        paged_attention(
            self.inputs.query, self.caches[number], batch, self.out, scale=self.inputs.scale
        )

    def write(self, number: int) -> None:
        write_kv(self.new_key, self.new_value, self.caches[number], self.new_slots)

    def poison(self) -> None:
        self.out.fill_(float("nan"))

    def output(self) -> torch.Tensor:
        return self.out
