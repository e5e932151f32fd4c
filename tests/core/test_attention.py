"""The operator against a double-precision reference, on every instruction set of this machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from bmc_core import native
from bmc_core.attention import (
    DTYPES,
    FP8_DTYPES,
    HEAD_SIZES,
    MAX_SEQ_LEN,
    AttentionBatch,
    paged_attention,
    write_kv,
)
from tests.support.reference import (
    EDGE_LENGTHS,
    Case,
    Inputs,
    assert_matches_reference,
    cases,
    quantized,
)


@pytest.fixture(params=native.usable_isas())
def isa(request):
    with native.forced_isa(request.param):
        yield request.param


@pytest.mark.parametrize("name", native.usable_isas())
@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases())
def test_matches_reference(name: str, case: Case) -> None:
    with native.forced_isa(name):
        assert_matches_reference(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_head_size(isa: str, dtype: torch.dtype, head_size: int) -> None:
    assert_matches_reference(
        Case(seq_lens=[77, 40], query_lens=[1, 6], head_size=head_size, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", EDGE_LENGTHS)
def test_lengths_around_a_chunk(isa: str, dtype: torch.dtype, length: int) -> None:
    assert_matches_reference(
        Case(seq_lens=[length, 5], query_lens=[min(1, length), 1], dtype=dtype)
    )


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float8_e4m3fn)],
)
@pytest.mark.parametrize("group", [128, 161, 192, 256])
def test_many_query_heads_share_a_kv_head(
    isa: str, group: int, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    """A group of more heads than an item has rows for is several items."""
    case = Case(
        seq_lens=[40, 300, 9],
        query_lens=[1, 3, 0],
        query_heads=group,
        kv_heads=1,
        dtype=dtype,
        cache_dtype=cache_dtype,
        alibi=True,
        sinks=True,
    )
    rows = {}
    for seq, _, begin, count, *_, first_head, heads, _ in (
        Inputs(case).batch().plan(4, group, 1, 0).work_items()
    ):
        assert count * heads <= 128
        for position in range(begin, begin + count):
            rows.setdefault((seq, position), []).extend(range(first_head, first_head + heads))
    assert sorted(rows) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert all(sorted(heads) == list(range(group)) for heads in rows.values())
    assert_matches_reference(case)


@pytest.mark.parametrize("query_len", [1, 150])
@pytest.mark.parametrize("block_size", [16, 32])
def test_blocks_that_no_query_sees_may_be_anything(
    isa: str, block_size: int, query_len: int
) -> None:
    """Ids before a window or of padding: callers mark blocks that they gave back with -1."""
    for dtype in DTYPES:
        case = Case(
            seq_lens=[300, 200, 250],
            query_lens=[query_len, 1, 0],
            query_heads=8,
            block_size=block_size,
            dtype=dtype,
            sliding_window=40,
            first_rows=[0, 190, 0],
        )
        inputs = Inputs(case)
        first_seen = [300 - query_len + 1 - 40, 190, 250]
        for seq, first in enumerate(first_seen):
            inputs.block_table[seq, : max(0, first) // block_size] = -1
        inputs.block_table[2] = 2**31 - 1
        expected = inputs.reference()
        torch.testing.assert_close(inputs.run().float(), expected, atol=2e-2, rtol=0)
        inputs.block_table[0, max(0, first_seen[0]) // block_size] = -1
        with pytest.raises(IndexError, match="block table holds block id -1; allowed: 0 to"):
            inputs.run()


def test_the_longest_sequence(isa: str) -> None:
    """Positions next to the limit on lengths; only the window's part of the table is touched."""
    window, block_size = 100, 16
    case = Case(seq_lens=[112], query_lens=[1], block_size=block_size, sliding_window=window)
    inputs = Inputs(case)
    width = MAX_SEQ_LEN // block_size
    table = torch.from_numpy(np.zeros((1, width), dtype=np.int32))  # pages appear when written
    taken = inputs.block_table[0, : 112 // block_size]
    table[0, width - len(taken) :] = taken
    starts = torch.tensor([0, 1], dtype=torch.int32)
    lengths = torch.tensor([MAX_SEQ_LEN], dtype=torch.int32)
    expected = inputs.run()
    out = inputs.run(AttentionBatch(starts, lengths, table, block_size))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("cache_dtype", [None, *FP8_DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_batch(isa: str, dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    """Decodes, a verification, a prefill and a prefill chunk in one call."""
    scale = 1.0 if cache_dtype is None else 0.05
    assert_matches_reference(
        Case(
            seq_lens=[513, 64, 129, 300, 190],
            query_lens=[1, 1, 6, 300, 90],
            query_heads=8,
            kv_heads=2,
            head_size=128,
            dtype=dtype,
            cache_dtype=cache_dtype,
            key_scale=scale,
            value_scale=scale,
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len", [1, 3, 150])
def test_left_padding(isa: str, dtype: torch.dtype, query_len: int) -> None:
    """Rows before the first one that counts hold NaN and are not seen; queries there give zeros."""
    case = Case(
        seq_lens=[150, 150, 150, 150],
        query_lens=[query_len] * 4,
        query_heads=8,
        dtype=dtype,
        first_rows=[0, 17, 149, 150],
    )
    inputs = Inputs(case)
    for seq, first in enumerate(case.first_rows):
        blocks = inputs.block_table[seq].long()
        rows = torch.arange(first)
        nan = torch.full((first, case.kv_heads, case.head_size), math.nan, dtype=dtype)
        slots = blocks[rows // case.block_size] * case.block_size + rows % case.block_size
        write_kv(nan, nan, inputs.kv_cache, slots)
    out = inputs.run().float()
    torch.testing.assert_close(out, inputs.reference(), atol=2e-2, rtol=0)
    assert (out[-query_len:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(1, 1), (32, 1), (71, 1), (8, 8)])
def test_one_long_sequence_is_split(
    isa: str, dtype: torch.dtype, query_heads: int, kv_heads: int
) -> None:
    """A single long sequence is cut along its rows so that no thread runs it alone."""
    case = Case(
        seq_lens=[4097],
        query_lens=[2],
        query_heads=query_heads,
        kv_heads=kv_heads,
        dtype=dtype,
        sinks=True,
    )
    inputs = Inputs(case)
    items = inputs.batch().plan(2, query_heads, kv_heads, 0).work_items()
    if native.num_threads() > 1 and kv_heads == 1:
        assert all(split_group >= 0 for *_, split_group in items)
    for head, query_begin, count in {(item[1], item[2], item[3]) for item in items}:
        shares = [item for item in items if (item[1], item[2]) == (head, query_begin)]
        spans = sorted((item[4], item[5]) for item in shares)
        assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == 4097 - 2 + query_begin + count
    assert_matches_reference(case)


def test_a_batch_serves_many_layers_and_geometries(isa: str) -> None:
    inputs = Inputs(Case(seq_lens=[2048, 33], query_lens=[1, 1], query_heads=4, kv_heads=1))
    batch = inputs.batch()
    first = inputs.run(batch)
    for _ in range(3):
        assert torch.equal(inputs.run(batch), first)


def test_later_changes_of_the_block_table_have_no_effect() -> None:
    inputs = Inputs(Case(seq_lens=[100], query_lens=[1]))
    batch = inputs.batch()
    expected = inputs.run(batch)
    inputs.block_table.fill_(2**30)
    assert torch.equal(inputs.run(batch), expected)


def test_strided_query_and_output(isa: str) -> None:
    """vLLM hands views of a fused QKV buffer."""
    inputs = Inputs(Case(seq_lens=[40, 90], query_lens=[3, 1], dtype=torch.bfloat16))
    expected = inputs.run()
    tokens, heads, head_size = inputs.query.shape
    fused = torch.randn(tokens, 3 * heads, head_size, dtype=torch.bfloat16)
    fused[:, heads : 2 * heads] = inputs.query
    inputs.query = fused[:, heads : 2 * heads]
    assert torch.equal(inputs.run(), expected)


def test_nan_in_a_seen_row_reaches_the_output(isa: str) -> None:
    """Masking hides stale rows only: a NaN that the model produced must not be hidden."""
    for dtype in DTYPES:
        inputs = Inputs(Case(seq_lens=[50, 50], query_lens=[1, 1], dtype=dtype, poison=0.0))
        row = 10
        block = int(inputs.block_table[0, row // 32])
        bad = torch.full((1, 2, 64), float("nan"), dtype=dtype)
        write_kv(bad, bad, inputs.kv_cache, torch.tensor([block * 32 + row]))
        out = inputs.run()
        assert torch.isnan(out[0]).all()
        assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", FP8_DTYPES)
def test_fp8_codes_are_torchs(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Every code, the midpoints between codes, values out of range, NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(cache_dtype).float()
    finite = codes[codes.isfinite()].sort().values
    between = (finite[1:] + finite[:-1]) / 2
    near = torch.cat([between * (1 + 2e-3), between * (1 - 2e-3)])
    special = torch.tensor([1e-30, -1e-30, 6e4, -6e4, float("inf"), float("-inf"), float("nan")])
    rows = torch.cat([codes, finite, between, near, special])
    rows = torch.cat([rows, torch.zeros(-len(rows) % 32)]).to(dtype).view(-1, 1, 32)
    blocks = -(-len(rows) // 16)
    cache = torch.zeros(blocks, 1, 16, 64).to(cache_dtype)
    write_kv(rows, rows, cache, torch.arange(len(rows)))
    # K: [D/2][16][2] per block, V: [16/2][D][2] behind it.
    raw = cache.view(torch.uint8).view(blocks, 2, 512)
    keys = raw[:, 0].view(blocks, 16, 16, 2).permute(0, 2, 1, 3).reshape(-1, 32)[: len(rows)]
    values = raw[:, 1].view(blocks, 8, 32, 2).permute(0, 1, 3, 2).reshape(-1, 32)[: len(rows)]
    expected = quantized(rows[:, 0], 1.0, cache_dtype).view(torch.uint8)
    nan = rows[:, 0].isnan()
    for got in (keys, values):
        assert torch.equal(got[~nan], expected[~nan])
        assert got.contiguous().view(cache_dtype).float()[nan].isnan().all()


@pytest.mark.parametrize("query_heads", [1, 16])
@pytest.mark.parametrize("cache_dtype", FP8_DTYPES)
def test_every_fp8_code_is_read_as_its_value(
    isa: str, cache_dtype: torch.dtype, query_heads: int
) -> None:
    """Few query rows decode in registers, more by an unpacked copy; subnormals and signs included.

    A sequence per code: row 0 has K = V = 0, row 1 has the code everywhere, and the query takes
    its K to a score of 1.
    """
    codes = torch.arange(256, dtype=torch.uint8).view(cache_dtype).float()
    codes = codes[codes.isfinite() & (codes != 0)]
    count = len(codes)
    cache = torch.zeros(count, 1, 16, 64).to(cache_dtype)
    rows = codes.view(-1, 1, 1).expand(count, 1, 32).contiguous()
    write_kv(rows, rows, cache, torch.arange(count) * 16 + 1)
    query = (1 / codes / 32).view(-1, 1, 1).expand(count, query_heads, 32).contiguous()
    ones = torch.ones(count, dtype=torch.int32)
    batch = AttentionBatch(
        torch.arange(count + 1, dtype=torch.int32),
        2 * ones,
        torch.arange(count, dtype=torch.int32).view(-1, 1),
        16,
    )
    out = torch.full_like(query, math.nan)
    paged_attention(query, cache, batch, out, scale=1.0)
    expected = (codes * torch.sigmoid(torch.tensor(1.0))).view(-1, 1, 1).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("cache_dtype", FP8_DTYPES)
def test_nan_in_an_fp8_cache_reaches_the_output(
    isa: str, cache_dtype: torch.dtype, queries: int
) -> None:
    """Of K: everything that sees the row. Of V: its dimension. The others stay as they were."""
    case = Case(seq_lens=[150], query_lens=[queries], cache_dtype=cache_dtype, poison=0.0)
    clean = Inputs(case).run()
    for part in (0, 1):
        inputs = Inputs(case)
        block = int(inputs.block_table[0, 70 // 32])
        raw = inputs.kv_cache.view(torch.uint8)[block, 0].flatten()
        row, dim = 70 % 32, 5
        if part == 0:  # [rows/16][D/2][16][2]
            at = row // 16 * 16 * 64 + dim // 2 * 32 + row % 16 * 2 + dim % 2
        else:  # [rows/2][D][2]
            at = 32 * 64 + row // 2 * 128 + dim * 2 + row % 2
        raw[at] = 0xFF
        out = inputs.run()
        heads = case.query_heads // case.kv_heads
        seen = torch.zeros_like(out, dtype=torch.bool)
        seen[:, :heads, slice(None) if part == 0 else dim] = True
        assert out[seen].isnan().all()
        torch.testing.assert_close(out[~seen], clean[~seen])


def test_fp8_scales_belong_to_fp8_caches() -> None:
    inputs = Inputs(Case(seq_lens=[5], query_lens=[1]))
    inputs.case.key_scale = 2.0
    with pytest.raises(ValueError, match="key_scale is 2.0; allowed: 1 for a cache of"):
        inputs.run()
    inputs = Inputs(Case(seq_lens=[5], query_lens=[1], cache_dtype=torch.float8_e5m2))
    inputs.case.value_scale = 0.0
    with pytest.raises(ValueError, match="value_scale is 0.0; allowed: a positive number"):
        inputs.run()


def test_empty_batch() -> None:
    assert_matches_reference(Case(seq_lens=[5, 0], query_lens=[0, 0]))
