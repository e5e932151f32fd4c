"""Double-precision einsum reference of paged attention, and random cases for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from bmc_core.attention import (
    DTYPES,
    FP8_DTYPES,
    HEAD_SIZES,
    AttentionBatch,
    paged_attention,
    write_kv,
)

# Largest error allowed, relative to the largest magnitude of the reference output. bfloat16 and
# float16 round the output itself by 2^-9 and 2^-12; bfloat16 instructions also round the
# probabilities.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class Case:
    """One batch: `query_lens[i]` query rows at the end of `seq_lens[i]` KV rows."""

    seq_lens: list[int]
    query_lens: list[int]
    query_heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    block_size: int = 32
    dtype: torch.dtype = torch.float32
    causal: bool = True
    sliding_window: int | None = None
    alibi: bool = False
    logits_soft_cap: float = 0.0
    sinks: bool = False
    seed: int = 0
    poison: float = float("nan")
    cache_dtype: torch.dtype | None = None  # float8; None: the queries' dtype
    key_scale: float = 1.0
    value_scale: float = 1.0
    first_rows: list[int] | None = None  # left padding


R = 128
EDGE_LENGTHS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, R - 1, R, R + 1, 300]


@st.composite
def cases(draw, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    kv_heads = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 2, 3, 4, 7] if kv_heads > 1 else [1, 4, 8, 71, 192]))
    seq_lens, query_lens = [], []
    for _ in range(draw(st.integers(1, 4))):
        seq_len = draw(st.sampled_from(EDGE_LENGTHS) | st.integers(0, 400))
        # Hundreds of heads are many rows already.
        lengths = [1, 1, 2, 5, 9, 33, 64, seq_len] if group < 100 else [1, 2, 5]
        seq_lens.append(seq_len)
        query_lens.append(min(draw(st.sampled_from(lengths)), seq_len))
    causal = draw(st.booleans())
    first_rows = draw(st.none() | st.tuples(*(st.integers(0, n) for n in seq_lens)).map(list))
    cache_dtype = draw(st.sampled_from([None, None, None, *FP8_DTYPES]))
    scales = st.just(1.0) if cache_dtype is None else st.sampled_from([0.02, 1.0, 3.5])
    poison = draw(st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0]))
    if cache_dtype == torch.float8_e4m3fn and math.isinf(poison):
        poison = float("nan")  # the format has no infinity
    return Case(
        seq_lens=seq_lens,
        query_lens=query_lens,
        query_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_size=draw(st.sampled_from(HEAD_SIZES)),
        block_size=draw(st.sampled_from([16, 32, 48, 128])),
        dtype=draw(st.sampled_from(dtypes)),
        causal=causal,
        sliding_window=draw(st.none() | st.integers(1, 400)) if causal else None,
        alibi=draw(st.booleans()) if causal else False,
        logits_soft_cap=draw(st.sampled_from([0.0, 0.0, 5.0, 50.0])),
        sinks=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        poison=poison,
        cache_dtype=cache_dtype,
        key_scale=draw(scales),
        value_scale=draw(scales),
        first_rows=first_rows,
    )


class Inputs:
    """Tensors of a case: K and V written through `write_kv` into scattered, poisoned blocks."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(case.dtype)

        self.case = case
        tokens = sum(case.query_lens)
        self.query = random(tokens, case.query_heads, case.head_size)
        self.keys = [random(n, case.kv_heads, case.head_size) for n in case.seq_lens]
        self.values = [random(n, case.kv_heads, case.head_size) for n in case.seq_lens]
        self.slopes = torch.rand(case.query_heads, generator=generator) if case.alibi else None
        self.sinks = torch.randn(case.query_heads, generator=generator) if case.sinks else None
        self.scale = case.head_size**-0.5

        needed = [math.ceil(n / case.block_size) for n in case.seq_lens]
        num_blocks = sum(needed) + 3  # block 0 is the null block, some stay unused
        order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        width = max([*needed, 1]) + 1
        self.block_table = torch.zeros(len(needed), width, dtype=torch.int32)
        self.kv_cache = torch.full(
            (num_blocks, case.kv_heads, case.block_size, 2 * case.head_size),
            case.poison,
            dtype=case.cache_dtype or case.dtype,
        )
        for seq, count in enumerate(needed):
            taken, order = order[:count], order[count:]
            self.block_table[seq, :count] = torch.tensor(taken, dtype=torch.int32)
            rows = torch.arange(case.seq_lens[seq])
            blocks = self.block_table[seq].long()[rows // case.block_size]
            slots = blocks * case.block_size + rows % case.block_size
            write_kv(
                self.keys[seq],
                self.values[seq],
                self.kv_cache,
                slots,
                key_scale=case.key_scale,
                value_scale=case.value_scale,
            )
        self.query_start_loc = torch.tensor([0, *case.query_lens]).cumsum(0).to(torch.int32)
        self.seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32)

    def batch(self) -> AttentionBatch:
        return AttentionBatch(
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.case.block_size,
            causal=self.case.causal,
            first_rows=None
            if self.case.first_rows is None
            else torch.tensor(self.case.first_rows, dtype=torch.int32),
        )

    def run(self, batch: AttentionBatch | None = None) -> torch.Tensor:
        """The operator's output, into a buffer full of NaN."""
        out = torch.full_like(self.query, float("nan"))
        paged_attention(
            self.query,
            self.kv_cache,
            batch or self.batch(),
            out,
            scale=self.scale,
            sliding_window=self.case.sliding_window,
            alibi_slopes=self.slopes,
            logits_soft_cap=self.case.logits_soft_cap,
            sinks=self.sinks,
            key_scale=self.case.key_scale,
            value_scale=self.case.value_scale,
        )
        return out

    def stored(self, rows: torch.Tensor, scale: float) -> torch.Tensor:
        """What the cache should hold of `rows`."""
        if self.case.cache_dtype is None:
            return rows.double()
        return quantized(rows, scale, self.case.cache_dtype).double() * scale

    def reference(self) -> torch.Tensor:
        """The same by einsum over whole score matrices, in double precision, as float32."""
        case = self.case
        group = case.query_heads // case.kv_heads
        outputs = []
        for seq, query in enumerate(self.query.double().split(case.query_lens)):
            rows = case.seq_lens[seq]
            key = self.stored(self.keys[seq], case.key_scale)
            value = self.stored(self.values[seq], case.value_scale)
            grouped = query.unflatten(1, (case.kv_heads, group))
            logits = torch.einsum("qhgd,khd->hgqk", grouped, key).flatten(0, 1) * self.scale
            if case.logits_soft_cap:
                logits = case.logits_soft_cap * torch.tanh(logits / case.logits_soft_cap)
            query_pos = torch.arange(rows - query.shape[0], rows)[:, None]
            key_pos = torch.arange(rows)[None, :]
            if self.slopes is not None:
                logits = logits + self.slopes[:, None, None] * (key_pos - query_pos)
            seen = torch.ones(query.shape[0], rows, dtype=torch.bool)
            if case.causal:
                seen &= key_pos <= query_pos
            if case.sliding_window is not None:
                seen &= key_pos > query_pos - case.sliding_window
            if case.first_rows is not None:
                seen &= key_pos >= case.first_rows[seq]
            logits = logits.masked_fill(~seen, float("-inf"))
            if self.sinks is not None:
                sink = self.sinks[:, None, None].expand(-1, query.shape[0], 1)
                weights = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
            else:
                weights = logits.softmax(-1).nan_to_num(0.0)
            grouped = weights.unflatten(0, (case.kv_heads, group))
            outputs.append(torch.einsum("hgqk,khd->qhgd", grouped, value).flatten(1, 2))
        return torch.cat(outputs).float()


def quantized(rows: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """`rows / scale` as saturating fp8, by torch."""
    limit = torch.finfo(dtype).max
    return (rows.float() * (1.0 / scale)).clamp(-limit, limit).to(dtype)


def assert_matches_reference(case: Case) -> None:
    inputs = Inputs(case)
    out, expected = inputs.run().float(), inputs.reference()
    assert torch.isfinite(out).all(), case
    if expected.numel() == 0:
        return
    error = (out - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
    assert error <= TOLERANCE[case.dtype], (float(error), case)
