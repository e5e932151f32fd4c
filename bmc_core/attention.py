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
import math
import operator
from typing import TYPE_CHECKING, NamedTuple

import torch

from bmc_core import native

if TYPE_CHECKING:
    from bmc_core._native import Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
HEAD_SIZES = range(32, 257, 16)
BLOCK_ROWS = 16
MAX_SEQ_LEN = 2**30  # KV rows of a sequence, rows of a block, query rows of a call

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_FP8_CODES = {dtype: code for code, dtype in enumerate(FP8_DTYPES, 1)}
_FLOAT32 = torch.finfo(torch.float32)
_WINDOWS = "a positive number of rows, or None"
_SOFT_CAPS = "0 (none) or a positive finite float32"


# Called for every layer of every step: what is allowed is put into words only where it is not met.
def _refusal(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name} is {value}; allowed: {allowed}")


def _check_cpu_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, dim: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; allowed: a torch.Tensor")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on device {tensor.device}; allowed: cpu")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: {dtype}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {dim} dimensions")
    # A CPU tensor's memory may still hold other values than the tensor, or not exist.
    if tensor.is_neg():
        raise ValueError(
            f"{name} has its negative bit set (a view such as x.conj().imag); "
            "allowed: a tensor whose memory holds its values, as resolve_neg() gives"
        )
    if not _has_memory(tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__} without memory of its own; "
            "allowed: a strided tensor with storage (no fake, sparse or freed one)"
        )


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        # The storage's address: that of a freed tensor is null, whatever its own offset is.
        return tensor.untyped_storage().data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # sparse, or a wrapper of transforms: "does not have storage"
        return False


def _check_number(name: str, value: float, allowed: str = "a finite float32") -> None:
    try:
        finite = math.fabs(value) <= _FLOAT32.max
    except OverflowError:  # an integer beyond any float
        finite = False
    except TypeError:
        raise TypeError(f"{name} is {value!r}; allowed: {allowed}") from None
    if not finite:
        raise _refusal(name, value, allowed)


def _whole_number(name: str, value: int, allowed: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; allowed: {allowed}") from None


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two elements might lie at one address (never False where two do)."""
    reach = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def _check_rows(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """`[tokens, heads, head size]`, any strides but the last, which must be 1."""
    _check_cpu_tensor(name, tensor, dtype, 3)
    if tensor.stride(2) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; allowed: a contiguous last dimension"
        )


class _CacheGeometry(NamedTuple):
    """Shape and strides of a KV cache tensor."""

    num_blocks: int
    heads: int
    block_size: int
    head_size: int
    stride_block: int
    stride_head: int
    overlaps: bool


def _cache_geometry(kv_cache: torch.Tensor) -> _CacheGeometry:
    if not isinstance(kv_cache, torch.Tensor):
        raise TypeError(f"kv_cache is a {type(kv_cache).__name__}; allowed: a torch.Tensor")
    if kv_cache.dtype not in _DTYPE_CODES and kv_cache.dtype not in _FP8_CODES:
        raise TypeError(f"kv_cache has dtype {kv_cache.dtype}; allowed: {(*DTYPES, *FP8_DTYPES)}")
    _check_cpu_tensor("kv_cache", kv_cache, kv_cache.dtype, 4)
    return _checked_geometry(kv_cache.shape, kv_cache.stride())


@functools.lru_cache(maxsize=256)
def _checked_geometry(shape: tuple[int, ...], strides: tuple[int, ...]) -> _CacheGeometry:
    num_blocks, heads, block_size, width = shape
    stride_block, stride_head, stride_row, stride_element = strides
    if width % 2 or width // 2 not in HEAD_SIZES:
        raise _refusal(
            "kv_cache's last dimension", width, "2 x a head size of 32 to 256 in steps of 16"
        )
    if block_size <= 0 or block_size % BLOCK_ROWS:
        raise _refusal("kv_cache's block size", block_size, f"multiples of {BLOCK_ROWS}")
    if stride_element != 1 or stride_row != width:
        raise ValueError(
            f"kv_cache has strides {strides}; allowed: contiguous inside a "
            "(block, head), that is head-major blocks"
        )
    overlaps = _overlaps(shape, strides)
    return _CacheGeometry(
        num_blocks, heads, block_size, width // 2, stride_block, stride_head, overlaps
    )


def _type_codes(name: str, rows: torch.Tensor, kv_cache: torch.Tensor) -> tuple[int, int]:
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
        _check_number(name, scale, allowed)
        if scale < _FLOAT32.tiny or not (quantized or scale == 1.0):
            raise _refusal(name, scale, allowed)


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
        ValueError, IndexError: a shape, stride, device or slot is not allowed, or a tensor has no
            memory of its own. Nothing was written.
    """
    cache = _cache_geometry(kv_cache)
    if cache.overlaps:
        raise _refusal("kv_cache's strides", kv_cache.stride(), "blocks that do not overlap")
    dtype_code, cache_code = _type_codes("key", key, kv_cache)
    _check_rows("key", key, key.dtype)
    _check_rows("value", value, key.dtype)
    _check_scales(kv_cache, key_scale, value_scale)
    _check_cpu_tensor("slot_mapping", slot_mapping, torch.int64, 1)
    tokens = key.shape[0]
    shape = (tokens, cache.heads, cache.head_size)
    if key.shape != shape:
        raise _refusal("key's shape", tuple(key.shape), f"{shape} (kv_cache's)")
    if value.shape != shape:
        raise _refusal("value's shape", tuple(value.shape), f"{shape} (key's)")
    if slot_mapping.shape[0] < tokens or not slot_mapping.is_contiguous():
        raise _refusal(
            "slot_mapping's shape",
            tuple(slot_mapping.shape),
            f"contiguous, at least {tokens} (one slot per token)",
        )
    native.module().write(
        key.data_ptr(),
        key.stride(0),
        key.stride(1),
        value.data_ptr(),
        value.stride(0),
        value.stride(1),
        kv_cache.data_ptr(),
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
        _check_cpu_tensor("query_start_loc", query_start_loc, torch.int32, 1)
        _check_cpu_tensor("seq_lens", seq_lens, torch.int32, 1)
        _check_cpu_tensor("block_table", block_table, torch.int32, 2)
        allowed = f"multiples of {BLOCK_ROWS} up to {MAX_SEQ_LEN}"
        block_size = _whole_number("block_size", block_size, allowed)
        if not 0 < block_size <= MAX_SEQ_LEN or block_size % BLOCK_ROWS:
            raise _refusal("block_size", block_size, allowed)
        if not isinstance(causal, bool):
            raise TypeError(f"causal is {causal!r}; allowed: True or False")
        sequences = seq_lens.shape[0]
        if query_start_loc.shape[0] != sequences + 1:
            raise _refusal(
                "query_start_loc's length",
                query_start_loc.shape[0],
                f"{sequences + 1} (sequences + 1)",
            )
        if block_table.shape[0] < sequences:
            raise _refusal(
                "block_table's shape",
                tuple(block_table.shape),
                f"at least {sequences} rows (one per sequence)",
            )
        if block_table.shape[1] > 0 and block_table.stride(1) != 1:
            raise ValueError(
                f"block_table has strides {block_table.stride()}; allowed: contiguous rows"
            )
        if first_rows is not None:
            _check_cpu_tensor("first_rows", first_rows, torch.int32, 1)
            if first_rows.shape[0] != sequences:
                raise _refusal(
                    "first_rows' length", first_rows.shape[0], f"{sequences} (one per sequence)"
                )
            first_rows = first_rows.contiguous()
        self.first_rows = first_rows
        self.query_start_loc = query_start_loc.contiguous()
        self.seq_lens = seq_lens.contiguous()
        self.block_table = block_table
        self.block_size = block_size
        self.causal = causal
        self._plans: dict[tuple[int, int, int], Plan] = {}

    def plan(self, tokens: int, num_query_heads: int, num_kv_heads: int, window: int) -> Plan:
        """The native plan for one layer geometry and `tokens` query rows; `window` 0 means none."""
        key = (num_query_heads, num_kv_heads, window)
        plan = self._plans.get(key)
        if plan is None:
            plan = native.module().Plan(
                self.query_start_loc.data_ptr(),
                self.seq_lens.data_ptr(),
                0 if self.first_rows is None else self.first_rows.data_ptr(),
                self.block_table.data_ptr(),
                self.seq_lens.shape[0],
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
            raise _refusal(
                "query's rows", tokens, f"{plan.num_tokens} (the end of query_start_loc)"
            )
        return plan


def _per_head(name: str, tensor: torch.Tensor | None, heads: int) -> int:
    """Address of a float32 `[heads]` tensor, 0 for None."""
    if tensor is None:
        return 0
    _check_cpu_tensor(name, tensor, torch.float32, 1)
    if tensor.shape[0] != heads or not tensor.is_contiguous():
        raise _refusal(
            f"{name}'s shape",
            tuple(tensor.shape),
            f"contiguous ({heads},), one value per query head",
        )
    return tensor.data_ptr()


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
        out: same shape and dtype as `query`.
        scale: factor of the logits, usually `head_size ** -0.5`.
        sliding_window: a query sees this many rows, its own included; None: all.
        alibi_slopes: float32 `[query heads]`.
        logits_soft_cap: 0: none.
        sinks: float32 `[query heads]`.
        key_scale, value_scale: what an fp8 cache's keys and values are multiplied by.

    Raises:
        TypeError: a dtype or a setting's type is not the allowed one.
        ValueError, IndexError: a shape, stride, device, length, block id or setting is not allowed,
            or a tensor has no memory of its own.
        RuntimeError: another thread attends with the same batch.
    """
    cache = _cache_geometry(kv_cache)
    dtype_code, cache_code = _type_codes("query", query, kv_cache)
    _check_rows("query", query, query.dtype)
    _check_rows("out", out, query.dtype)
    _check_scales(kv_cache, key_scale, value_scale)
    _check_number("scale", scale)
    _check_number("logits_soft_cap", logits_soft_cap, _SOFT_CAPS)
    tokens, heads, head_size = query.shape
    if head_size != cache.head_size:
        raise _refusal("query's head size", head_size, f"{cache.head_size}")
    if out.shape != query.shape:
        raise _refusal("out's shape", tuple(out.shape), f"{tuple(query.shape)}")
    if not out.is_contiguous() and _overlaps(out.shape, out.stride()):
        raise _refusal("out's strides", out.stride(), "rows that do not overlap")
    if batch.block_size != cache.block_size:
        raise _refusal(
            "the batch's block_size", batch.block_size, f"{cache.block_size} (kv_cache's)"
        )
    window = 0
    if sliding_window is not None:
        window = _whole_number("sliding_window", sliding_window, _WINDOWS)
        if window <= 0:
            raise _refusal("sliding_window", sliding_window, _WINDOWS)
    if logits_soft_cap != 0.0 and logits_soft_cap < _FLOAT32.tiny:
        raise _refusal("logits_soft_cap", logits_soft_cap, _SOFT_CAPS)
    slopes = _per_head("alibi_slopes", alibi_slopes, heads)
    sink_logits = _per_head("sinks", sinks, heads)
    plan = batch.plan(tokens, heads, cache.heads, min(window, MAX_SEQ_LEN))
    native.module().attend(
        plan,
        tokens,
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        kv_cache.data_ptr(),
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
