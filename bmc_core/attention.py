"""The attention operator over a paged KV cache: write new rows, attend over all rows.

Promises: right for every input it accepts, and a Python exception naming the argument, its value
and what is allowed for every other one; it never crashes the process. Knows nothing of frameworks,
of who owns the blocks, and of which instruction set runs (`bmc_core.native`).

The cache is `[num_blocks, kv heads, block_size, 2 * head size]`, contiguous inside a (block, KV
head). Only this module's kernels read or write it: inside, K is kept in transposed tiles of 16 rows
and V in packs of rows (`csrc/attention.h`). Rows that were never written, or were written for
somebody else, may hold anything, NaN and Inf too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from bmc_core import native
from bmc_core.checks import (
    FLOAT32,
    Span,
    check_apart,
    check_cpu_tensor,
    check_number,
    check_rows,
    overlap,
    overlaps_itself,
    refusal,
    same_or_apart,
    spans_meet,
    whole_number,
)

if TYPE_CHECKING:
    from bmc_core._native import Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
HEAD_SIZES = range(32, 257, 16)
BLOCK_ROWS = 16
MAX_SEQ_LEN = 2**30  # KV rows of a sequence, rows of a block, query rows of a call
MAX_HEADS = 2**20  # of queries, of K and V: 32 bits hold what native code counts of them

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_FP8_CODES = {dtype: code for code, dtype in enumerate(FP8_DTYPES, 1)}
_BLOCK_SIZES = f"multiples of {BLOCK_ROWS} up to {MAX_SEQ_LEN}"
_WINDOWS = "a positive number of rows, or None"
_SOFT_CAPS = "0 (none) or a positive finite float32"


PlanKey = tuple[int, int, int]
"""What layers must have in common to share a plan: query heads, KV heads, window (0: none)."""


class _CacheGeometry(NamedTuple):
    """Shape and strides of a KV cache tensor."""

    num_blocks: int
    heads: int
    block_size: int
    head_size: int
    stride_block: int
    stride_head: int
    overlaps: bool


def _cache_geometry(kv_cache: torch.Tensor) -> tuple[_CacheGeometry, Span]:
    if not isinstance(kv_cache, torch.Tensor):
        raise TypeError(f"kv_cache is a {type(kv_cache).__name__}; allowed: a torch.Tensor")
    if kv_cache.dtype not in _DTYPE_CODES and kv_cache.dtype not in _FP8_CODES:
        raise TypeError(f"kv_cache has dtype {kv_cache.dtype}; allowed: {(*DTYPES, *FP8_DTYPES)}")
    span = check_cpu_tensor("kv_cache", kv_cache, kv_cache.dtype, 4)
    return _checked_geometry(kv_cache.shape, kv_cache.stride()), span


@functools.lru_cache(maxsize=256)
def _checked_geometry(shape: tuple[int, ...], strides: tuple[int, ...]) -> _CacheGeometry:
    num_blocks, heads, block_size, width = shape
    stride_block, stride_head, stride_row, stride_element = strides
    if width % 2 or width // 2 not in HEAD_SIZES:
        raise refusal(
            "kv_cache's last dimension", width, "2 x a head size of 32 to 256 in steps of 16"
        )
    if not 0 < block_size <= MAX_SEQ_LEN or block_size % BLOCK_ROWS:
        raise refusal("kv_cache's block size", block_size, _BLOCK_SIZES)
    if heads > MAX_HEADS:
        raise refusal("kv_cache's heads", heads, f"up to {MAX_HEADS}")
    if stride_element != 1 or stride_row != width:
        raise ValueError(
            f"kv_cache has strides {strides}; allowed: contiguous inside a "
            "(block, head), that is head-major blocks"
        )
    overlaps = overlaps_itself(shape, strides)
    return _CacheGeometry(
        num_blocks, heads, block_size, width // 2, stride_block, stride_head, overlaps
    )


def type_codes(name: str, rows: torch.Tensor, kv_cache: torch.Tensor) -> tuple[int, int]:
    """Native codes of the rows' dtype and of what the cache holds; checks that they go together."""
    if not isinstance(rows, torch.Tensor):
        raise TypeError(f"{name} is a {type(rows).__name__}; allowed: a torch.Tensor")
    fp8 = _FP8_CODES.get(kv_cache.dtype)
    if fp8 is None:
        if rows.dtype != kv_cache.dtype:
            raise TypeError(
                f"{name} has dtype {rows.dtype}; allowed: {kv_cache.dtype} (kv_cache's)"
            )
        return _DTYPE_CODES[rows.dtype], 0
    if rows.dtype not in _DTYPE_CODES:
        raise TypeError(f"{name} has dtype {rows.dtype}; allowed: {DTYPES}")
    return _DTYPE_CODES[rows.dtype], fp8


def _check_scales(kv_cache: torch.Tensor, key_scale: float, value_scale: float) -> None:
    if key_scale == value_scale == 1.0:
        return
    quantized = kv_cache.dtype in _FP8_CODES
    allowed = "a positive number" if quantized else f"1 for a cache of {kv_cache.dtype}"
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        check_number(name, scale, allowed)
        if scale < FLOAT32.tiny or not (quantized or scale == 1.0):
            raise refusal(name, scale, allowed)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Writes new rows into their slots of the cache.

    Into an fp8 cache go `key / key_scale` and `value / value_scale`, rounded to nearest; values
    beyond the format's range become its largest finite value, NaN stays NaN.

    Args:
        key: `[tokens, kv heads, head size]`, the cache's dtype (any of `DTYPES` for an fp8 cache),
            last dimension contiguous.
        value: same shape and dtype.
        kv_cache: `[num_blocks, kv heads, block_size, 2 * head size]`, changed in place.
        slot_mapping: int64 `[tokens]` or longer, `block * block_size + row`; negative: not written.

    Raises:
        TypeError: a dtype is not the allowed one.
        ValueError, IndexError: a shape, stride, device or slot is not allowed, a tensor has no
            memory of its own, `key` or `value` shares memory with the cache, or a gradient would be
            lost. Nothing was written.
    """
    cache, cache_span = _cache_geometry(kv_cache)
    if cache.overlaps:
        raise refusal("kv_cache's strides", kv_cache.stride(), "blocks that do not overlap")
    dtype_code, cache_code = type_codes("key", key, kv_cache)
    key_span, key_strides = check_rows("key", key, key.dtype)
    value_span, value_strides = check_rows("value", value, key.dtype)
    check_apart("key", key_span, "kv_cache", cache_span)
    check_apart("value", value_span, "kv_cache", cache_span)
    _check_scales(kv_cache, key_scale, value_scale)
    check_cpu_tensor("slot_mapping", slot_mapping, torch.int64, 1)
    tokens = key.shape[0]
    shape = (tokens, cache.heads, cache.head_size)
    if key.shape != shape:
        raise refusal("key's shape", tuple(key.shape), f"{shape} (kv_cache's)")
    if value.shape != shape:
        raise refusal("value's shape", tuple(value.shape), f"{shape} (key's)")
    if slot_mapping.shape[0] < tokens or not slot_mapping.is_contiguous():
        raise refusal(
            "slot_mapping's shape",
            tuple(slot_mapping.shape),
            f"contiguous, at least {tokens} (one slot per token)",
        )
    native.module().write(
        key_span[0],
        key_strides[0],
        key_strides[1],
        value_span[0],
        value_strides[0],
        value_strides[1],
        cache_span[0],
        cache.stride_block,
        cache.stride_head,
        slot_mapping.data_ptr(),
        tokens,
        cache.num_blocks,
        cache.heads,
        cache.block_size,
        cache.head_size,
        dtype_code,
        cache_code,
        key_scale,
        value_scale,
    )


class AttentionBatch:
    """One step's batch: which query rows belong to which sequence, and where its KV rows are.

    Built once per step and shared by all layers: what depends only on lengths and blocks (checks,
    the split over threads) is done at the first layer of each geometry, from then on later changes
    of the tensors have no effect. One thread at a time may attend with it: a second one is refused
    (RuntimeError), so make one batch for each thread.

    Args:
        query_start_loc: int32 `[sequences + 1]`, first query row of each sequence, then the total.
        seq_lens: int32 `[sequences]`, KV rows of each sequence, this step's rows included; at most
            `MAX_SEQ_LEN`.
        block_table: int32 `[sequences, width]`, block ids; entries past a sequence's length, or of
            blocks that lie wholly before what its first query row sees, may be anything.
        block_size: rows of one block, a multiple of 16.
        causal: the last query row of a sequence sees all its rows, the one before one less, ...;
            False: every query row sees all rows.
        first_rows: int32 `[sequences]`, rows before it are seen by no query of that sequence (left
            padding); None: all rows count.

    Raises:
        TypeError, ValueError: a dtype, shape or size is not allowed, or a tensor has no memory of
            its own (lengths and block ids are checked when a layer first uses the batch).
    """

    def __init__(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        *,
        causal: bool = True,
        first_rows: torch.Tensor | None = None,
    ) -> None:
        block_size = whole_number("block_size", block_size, _BLOCK_SIZES)
        if not 0 < block_size <= MAX_SEQ_LEN or block_size % BLOCK_ROWS:
            raise refusal("block_size", block_size, _BLOCK_SIZES)
        if not isinstance(causal, bool):
            raise TypeError(f"causal is {causal!r}; allowed: True or False")
        self.query_start_loc = query_start_loc
        self.seq_lens = seq_lens
        self.block_table = block_table
        self.first_rows = first_rows
        self.block_size = block_size
        self.causal = causal
        self._check_tensors()
        self._plans: dict[PlanKey, Plan] = {}

    def _check_tensors(self) -> None:
        """Types and shapes: when the batch is made, and again when they are read, since a tensor's
        shape and memory may change in between."""
        check_cpu_tensor("query_start_loc", self.query_start_loc, torch.int32, 1)
        check_cpu_tensor("seq_lens", self.seq_lens, torch.int32, 1)
        check_cpu_tensor("block_table", self.block_table, torch.int32, 2)
        sequences = self.seq_lens.shape[0]
        starts, rows = self.query_start_loc.shape[0], self.block_table.shape[0]
        if starts != sequences + 1:
            raise refusal("query_start_loc's length", starts, f"{sequences + 1} (sequences + 1)")
        if rows < sequences:
            raise refusal(
                "block_table's shape",
                tuple(self.block_table.shape),
                f"at least {sequences} rows (one per sequence)",
            )
        if self.block_table.shape[1] > 0 and self.block_table.stride(1) != 1:
            raise ValueError(
                f"block_table has strides {self.block_table.stride()}; allowed: contiguous rows"
            )
        if self.first_rows is not None:
            check_cpu_tensor("first_rows", self.first_rows, torch.int32, 1)
            count = self.first_rows.shape[0]
            if count != sequences:
                raise refusal("first_rows' length", count, f"{sequences} (one per sequence)")

    def planned(self, key: PlanKey) -> Plan | None:
        """The native plan of a geometry (`plan_key`) that a layer has used the batch with."""
        return self._plans.get(key)

    def plan(self, tokens: int, num_query_heads: int, num_kv_heads: int, window: int) -> Plan:
        """The native plan for one layer geometry and `tokens` query rows; `window` 0 means none."""
        key = (num_query_heads, num_kv_heads, window)
        plan = self._plans.get(key)
        if plan is None:
            self._check_tensors()
            starts, seq_lens = self.query_start_loc.contiguous(), self.seq_lens.contiguous()
            first_rows = None if self.first_rows is None else self.first_rows.contiguous()
            plan = native.module().Plan(
                starts.data_ptr(),
                seq_lens.data_ptr(),
                0 if first_rows is None else first_rows.data_ptr(),
                self.block_table.data_ptr(),
                seq_lens.shape[0],
                tokens,
                self.block_table.shape[1],
                self.block_table.stride(0),
                self.block_size,
                num_query_heads,
                num_kv_heads,
                window,
                self.causal,
            )
            self._plans[key] = plan
        if plan.num_tokens != tokens:
            raise refusal("query's rows", tokens, f"{plan.num_tokens} (the end of query_start_loc)")
        return plan


def plan_key(num_query_heads: int, num_kv_heads: int, sliding_window: int | None) -> PlanKey:
    """Of a layer that `paged_attention` takes.

    Raises:
        TypeError, ValueError: `sliding_window` is not allowed.
    """
    window = 0
    if sliding_window is not None:
        window = whole_number("sliding_window", sliding_window, _WINDOWS)
        if window <= 0:
            raise refusal("sliding_window", sliding_window, _WINDOWS)
    return num_query_heads, num_kv_heads, min(window, MAX_SEQ_LEN)


def _per_head(name: str, tensor: torch.Tensor | None, heads: int, out_span: Span) -> int:
    """Address of a float32 `[heads]` tensor, 0 for None."""
    if tensor is None:
        return 0
    span = check_cpu_tensor(name, tensor, torch.float32, 1)
    check_apart("out", out_span, name, span)
    if tensor.shape[0] != heads or not tensor.is_contiguous():
        raise refusal(
            f"{name}'s shape",
            tuple(tensor.shape),
            f"contiguous ({heads},), one value per query head",
        )
    return span[0]


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    out: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Attention of every query row over its sequence's KV rows, written into `out`.

    Logits are `scale * q.k`, then `cap * tanh(logit / cap)` where `logits_soft_cap` is not 0, then
    `+ slope * (key position - query position)`; `sinks` adds one logit per head to the softmax's
    denominator only. Sums are float32; with bfloat16 instructions the probabilities are rounded to
    bfloat16 before they weigh V. A query row that sees no KV row gives zeros.

    Args:
        query: `[tokens, query heads, head size]`, the cache's dtype (any of `DTYPES` for an fp8
            cache), last dimension contiguous.
        kv_cache: `[num_blocks, kv heads, block_size, 2 * head size]`.
        batch: which rows belong to whom; its query rows must be all of `query`'s.
        out: same shape and dtype as `query`; may be `query` itself, else shares no memory with
            what is read.
        scale: factor of the logits, usually `head_size ** -0.5`.
        sliding_window: a query sees this many rows, its own included; None: all.
        alibi_slopes: float32 `[query heads]`.
        logits_soft_cap: 0: none.
        sinks: float32 `[query heads]`.
        key_scale, value_scale: what an fp8 cache's keys and values are multiplied by.

    Raises:
        TypeError: a dtype or a setting's type is not the allowed one.
        ValueError, IndexError: a shape, stride, device, length, block id or setting is not allowed,
            a tensor has no memory of its own, `out` overlaps what is read, or a gradient would be
            lost.
        RuntimeError: another thread attends with the same batch.
    """
    cache, cache_span = _cache_geometry(kv_cache)
    dtype_code, cache_code = type_codes("query", query, kv_cache)
    query_span, query_strides = check_rows("query", query, query.dtype)
    out_span, out_strides = check_rows("out", out, query.dtype)
    _check_scales(kv_cache, key_scale, value_scale)
    check_number("scale", scale)
    check_number("logits_soft_cap", logits_soft_cap, _SOFT_CAPS)
    tokens, heads, head_size = query.shape
    if heads > MAX_HEADS:
        raise refusal("query's heads", heads, f"up to {MAX_HEADS}")
    if head_size != cache.head_size:
        raise refusal("query's head size", head_size, f"{cache.head_size}")
    if out.shape != query.shape:
        raise refusal("out's shape", tuple(out.shape), f"{tuple(query.shape)}")
    if not out.is_contiguous() and overlaps_itself(out.shape, out_strides):
        raise refusal("out's strides", out_strides, "rows that do not overlap")
    check_apart("out", out_span, "kv_cache", cache_span)
    if spans_meet(out_span, query_span) and not same_or_apart(out, query):
        raise overlap("out", "query")
    if not isinstance(batch, AttentionBatch):
        raise TypeError(f"batch is a {type(batch).__name__}; allowed: an AttentionBatch")
    if batch.block_size != cache.block_size:
        raise refusal(
            "the batch's block_size", batch.block_size, f"{cache.block_size} (kv_cache's)"
        )
    geometry = plan_key(heads, cache.heads, sliding_window)
    if logits_soft_cap != 0.0 and logits_soft_cap < FLOAT32.tiny:
        raise refusal("logits_soft_cap", logits_soft_cap, _SOFT_CAPS)
    slopes = _per_head("alibi_slopes", alibi_slopes, heads, out_span)
    sink_logits = _per_head("sinks", sinks, heads, out_span)
    plan = batch.plan(tokens, *geometry)
    native.module().attend(
        plan,
        tokens,
        query_span[0],
        query_strides[0],
        query_strides[1],
        out_span[0],
        out_strides[0],
        out_strides[1],
        cache_span[0],
        cache.num_blocks,
        cache.stride_block,
        cache.stride_head,
        cache.block_size,
        head_size,
        dtype_code,
        cache_code,
        scale * key_scale,
        value_scale,
        logits_soft_cap,
        slopes,
        sink_logits,
    )
