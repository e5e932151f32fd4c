"""CPU_ATTN: vLLM's own attention operators for CPUs.

The compiled operators are loaded by themselves, without vLLM's Python package: loading takes
milliseconds, and the build for another instruction set can be chosen (one per process).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from benchmarks.kernel.cases import Case
from benchmarks.kernel.inputs import Inputs, layout
from benchmarks.kernel.operators.base import Arena, Operator, Trial, Unusable, rows_to_load
from benchmarks.lib.instruction_sets import best_of_machine

BLOCK_SIZE = 128
"""Rows of a block where the case names none: vLLM's default on CPUs."""

MAX_HEADS_TO_SPLIT = 16

LIBRARIES = {
    "amx_bf16": "_C",
    "avx512_bf16": "_C",
    "avx512": "_C_AVX512",
    "avx2": "_C_AVX2",
    "portable": "_C_AVX2",
}
"""vLLM's build by the instruction set it is compiled for (ours name it; portable has no match)."""

_loaded: str | None = None


def load_operators(isa: str) -> None:
    """Registers vLLM's operators with torch, from the build for `isa`.

    Raises:
        Unusable: vLLM is not installed, lacks that build, or another one was loaded before.
    """
    global _loaded
    library = LIBRARIES[isa]
    if _loaded is not None and _loaded != library:
        raise Unusable(f"CPU_ATTN: {_loaded} is loaded already; one process holds one build")
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise Unusable("CPU_ATTN: vLLM is not installed in this environment")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob(f"{library}.*so"))
    if not files:
        raise Unusable(f"CPU_ATTN: vLLM here has no {library} library; is it a build for CPUs?")
    if _loaded is None and not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        try:
            torch.ops.load_library(str(files[0]))
        except OSError as error:
            raise Unusable(f"CPU_ATTN: vLLM's {library} does not load: {error}") from None
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise Unusable(f"CPU_ATTN: vLLM's {library} has no operator cpu_attention_with_kv_cache")
    if LIBRARIES[best_of_machine()] == "_C" == library:
        torch.cpu._init_amx()  # asks the system for tile registers where there are any
    _loaded = library


def kernel_name(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """vLLM's own choice of kernel (`_get_attn_isa`), with AMX only where `isa` says so."""
    if head_size % 32 != 0 or block_size % 32 != 0:
        return "vec16"
    return "amx" if isa == "amx_bf16" and dtype == torch.bfloat16 else "vec"


class CPUAttn(Operator):
    """vLLM's `cpu_attention_with_kv_cache`.

    Args:
        arena: memory of the rotating sets, this system's own.
        isa: instruction set to force, None for vLLM's choice.

    Raises:
        Unusable: see `load_operators`.
    """

    name = "cpu_attn"
    title = "CPU_ATTN"

    def __init__(self, arena: Arena, isa: str | None = None) -> None:
        self.isa = isa or best_of_machine()
        load_operators(self.isa)
        if self.isa == "portable":
            self.isa = "avx2"
        self.arena = arena

    def close(self) -> None:
        self.arena.release()

    def refusal(self, case: Case) -> str | None:
        if case.cache and self.isa == "avx2":
            return "has fp8 caches only with AVX-512"
        return None

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Trial:
        return _CPUAttnTrial(case, inputs, threads, self.arena, self.isa)


class _CPUAttnTrial(Trial):
    def __init__(self, case: Case, inputs: Inputs, threads: int, arena: Arena, isa: str) -> None:
        super().__init__(case, inputs, threads)
        block_size = case.block_size or BLOCK_SIZE
        self.kernel = kernel_name(isa, inputs.query.dtype, block_size, case.head_size)
        self.layout = layout(case, block_size, inputs.seed)
        # vLLM's cache is [blocks, KV heads, block, 2 * head size]; the operators see K and V as
        # the two halves of [blocks, KV heads, 2 * block, head size].
        shape = (self.layout.num_blocks, case.kv_heads, 2 * block_size, case.head_size)
        self.cache_dtype = case.cache or "auto"
        dtype = torch.uint8 if case.cache else inputs.query.dtype
        caches = arena.sets(shape, dtype, case.set_bytes)
        self.caches = [cache.chunk(2, dim=2) for cache in caches]
        self.whole = caches
        self.sets = len(caches)
        self.out = torch.empty_like(inputs.query)
        self.new_slots = self.layout.slots[inputs.last_rows]
        self.new_key = inputs.key[inputs.last_rows]
        self.new_value = inputs.value[inputs.last_rows]
        self.metadata: torch.Tensor | None = None
        # vLLM's default splits rows over threads, and refuses more than 16 query heads per KV head.
        self.split = case.query_heads <= MAX_HEADS_TO_SPLIT * case.kv_heads
        if not self.split:
            self.remark = "runs with VLLM_CPU_ATTN_SPLIT_KV=0; its default refuses the shape"

    def enter(self) -> None:
        super().enter()
        if self.metadata is None:
            # The split over threads is made for the threads of this moment.
            self.metadata = self._plan()

    def _plan(self) -> torch.Tensor:
        case, inputs = self.case, self.inputs
        return torch.ops._C.get_scheduler_metadata(
            case.batch,
            case.query_heads,
            case.kv_heads,
            case.head_size,
            inputs.seq_lens,
            inputs.query.dtype,
            inputs.query_start_loc,
            True,  # causal
            -1,  # no window
            self.kernel,
            self.split,
            None,
            self.cache_dtype,
        )

    def _store(self, key: torch.Tensor, value: torch.Tensor, number: int, slots) -> None:
        torch.ops._C.cpu_attn_reshape_and_cache(
            key, value, *self.caches[number], slots, self.kernel, 1.0, 1.0, self.cache_dtype
        )

    def load(self) -> None:
        # As an engine's pool begins. Rows past a sequence's end must be finite here: they are
        # multiplied by zero.
        self.whole[0].zero_()
        self._store(*rows_to_load(self.inputs), 0, self.layout.slots)

    def replicate(self) -> None:
        for cache in self.whole[1:]:
            cache.copy_(self.whole[0])

    def attend(self, number: int) -> None:
        inputs = self.inputs
        metadata = self._plan() if self.case.planning else self.metadata
        torch.ops._C.cpu_attention_with_kv_cache(
            inputs.query,
            *self.caches[number],
            self.out,
            inputs.query_start_loc,
            inputs.seq_lens,
            inputs.scale,
            True,  # causal
            None,  # ALiBi slopes
            -1,  # no window
            self.layout.block_table,
            0.0,  # no soft cap
            metadata,
            None,  # sinks
            None,
            1.0,
            1.0,
            self.cache_dtype,
        )

    def write(self, number: int) -> None:
        self._store(self.new_key, self.new_value, number, self.new_slots)

    def poison(self) -> None:
        self.out.fill_(float("nan"))

    def output(self) -> torch.Tensor:
        return self.out
