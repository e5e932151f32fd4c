"""Bad input raises an exception that names what and why; the process goes on."""

from __future__ import annotations

import math
import re

import pytest
import torch

from bmc_core import native
from bmc_core.attention import MAX_HEADS, MAX_SEQ_LEN, AttentionBatch, paged_attention, write_kv
from tests.support.reference import Inputs
from tests.support.small_batch import attend, small_inputs


@pytest.fixture
def inputs() -> Inputs:
    return small_inputs()


def test_wrong_dtypes(inputs: Inputs) -> None:
    with pytest.raises(TypeError, match=r"query has dtype torch.bfloat16; allowed: torch.float32"):
        attend(inputs, query=inputs.query.bfloat16())
    with pytest.raises(TypeError, match="out has dtype torch.float64"):
        attend(inputs, out=inputs.query.double())
    with pytest.raises(TypeError, match="kv_cache has dtype torch.float64"):
        attend(inputs, kv_cache=inputs.kv_cache.double())
    with pytest.raises(TypeError, match="query is a list"):
        attend(inputs, query=[1.0])
    with pytest.raises(TypeError, match="kv_cache is a NoneType"):
        attend(inputs, kv_cache=None)
    with pytest.raises(TypeError, match="batch is a NoneType; allowed: an AttentionBatch"):
        attend(inputs, batch=None)
    with pytest.raises(TypeError, match="alibi_slopes has dtype torch.float64"):
        attend(inputs, alibi_slopes=torch.zeros(4, dtype=torch.float64))


def test_wrong_shapes(inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="query's head size is 32; allowed: 64"):
        attend(inputs, query=inputs.query[..., :32].contiguous())
    with pytest.raises(ValueError, match="query has shape"):
        attend(inputs, query=inputs.query.flatten(1))
    with pytest.raises(ValueError, match="query's rows is 2; allowed: 3"):
        attend(inputs, query=inputs.query[:2], out=torch.empty_like(inputs.query[:2]))
    batch = inputs.batch()
    attend(inputs, batch=batch)
    with pytest.raises(ValueError, match=r"query's rows is 2; allowed: 3 \(the end of"):
        attend(inputs, batch=batch, query=inputs.query[:2], out=torch.empty_like(inputs.query[:2]))
    with pytest.raises(ValueError, match="out's shape"):
        attend(inputs, out=torch.empty(3, 2, 64))
    with pytest.raises(ValueError, match=r"query heads \(3\) must be a positive multiple"):
        attend(inputs, query=inputs.query[:, :3], out=torch.empty(3, 3, 64))
    with pytest.raises(ValueError, match="sinks's shape"):
        attend(inputs, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="2 x a head size of 32 to 256 in steps of 16"):
        attend(inputs, kv_cache=torch.zeros(4, 2, 32, 48))
    with pytest.raises(ValueError, match="block size is 24; allowed: multiples of 16"):
        attend(inputs, kv_cache=torch.zeros(4, 2, 24, 128))
    with pytest.raises(ValueError, match="the batch's block_size is 32; allowed: 16"):
        attend(inputs, kv_cache=torch.zeros(4, 2, 16, 128))


def test_sizes_that_native_code_does_not_count(inputs: Inputs) -> None:
    """Tensors without elements may have any size."""
    for heads in (MAX_HEADS + 1, 2**31, 2**40):
        empty = torch.empty(0, heads, 64)
        cache = torch.empty(0, heads, 32, 128)
        with pytest.raises(ValueError, match=f"^query's heads is {heads}; allowed: up to 1048576"):
            attend(inputs, query=empty, out=empty.clone())
        with pytest.raises(ValueError, match=f"^kv_cache's heads is {heads}; allowed: up to"):
            attend(inputs, kv_cache=cache)
        with pytest.raises(ValueError, match=f"^kv_cache's heads is {heads}; allowed: up to"):
            write_kv(empty, empty, cache, torch.empty(0, dtype=torch.int64))
    for block_size in (MAX_SEQ_LEN + 16, 2**33):
        cache = torch.empty(0, 2, block_size, 128)
        message = f"^kv_cache's block size is {block_size}; allowed: multiples of 16 up to"
        with pytest.raises(ValueError, match=message):
            attend(inputs, kv_cache=cache)
        with pytest.raises(ValueError, match=message):
            write_kv(torch.empty(0, 2, 64), torch.empty(0, 2, 64), cache, torch.tensor([0]))


def test_the_most_heads_are_accepted() -> None:
    query = torch.empty(0, MAX_HEADS, 32)
    cache = torch.empty(0, MAX_HEADS, 16, 64)
    starts = torch.zeros(1, dtype=torch.int32)
    batch = AttentionBatch(starts, starts[1:], torch.empty(0, 1, dtype=torch.int32), 16)
    paged_attention(query, cache, batch, query.clone(), scale=1.0)
    write_kv(query, query, cache, torch.empty(0, dtype=torch.int64))


def test_wrong_strides(inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="query has strides"):
        attend(inputs, query=inputs.query.transpose(1, 2).contiguous().transpose(1, 2))
    row_major = inputs.kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="kv_cache has strides .* head-major"):
        attend(inputs, kv_cache=row_major)


def test_wrong_settings(inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="sliding_window is 0; allowed: a positive number"):
        attend(inputs, sliding_window=0)
    for window in (4.5, "4"):
        with pytest.raises(TypeError, match=f"sliding_window is {window!r}; allowed: a positive"):
            attend(inputs, sliding_window=window)
    for cap in (-1.0, math.inf, math.nan, 1e39, 1e-46):
        with pytest.raises(
            ValueError, match=rf"logits_soft_cap is {re.escape(str(cap))}; allowed: 0"
        ):
            attend(inputs, logits_soft_cap=cap)
    for scale in (math.inf, math.nan, 1e39, 10**400):
        with pytest.raises(
            ValueError, match=rf"^scale is {re.escape(str(scale))}; allowed: a finite"
        ):
            attend(inputs, scale=scale)
    for name in ("scale", "logits_soft_cap", "key_scale", "value_scale"):
        for value in ("x", None, [1.0], 1j):
            with pytest.raises(TypeError, match=rf"^{name} is {re.escape(repr(value))}; allowed: "):
                attend(inputs, **{name: value})
    batch = AttentionBatch(
        inputs.query_start_loc, inputs.seq_lens, inputs.block_table, 32, causal=False
    )
    with pytest.raises(ValueError, match="sliding_window needs causal"):
        attend(inputs, batch=batch, sliding_window=4)


def test_a_window_wider_than_any_sequence_is_none(inputs: Inputs) -> None:
    expected = inputs.run()
    for window in (2**31 - 1, 2**31, 2**63 - 1):
        inputs.case.sliding_window = window
        assert torch.equal(inputs.run(), expected)


@pytest.mark.parametrize("block", [-1, 5000, 2**31 - 1, -(2**31)])
def test_block_ids_out_of_range(inputs: Inputs, block: int) -> None:
    inputs.block_table[1, 0] = block
    with pytest.raises(IndexError, match=rf"block id {block}; allowed: 0 to "):
        attend(inputs)


def test_lengths_out_of_range(inputs: Inputs) -> None:
    for seq_lens, message in [
        ([40, -1], r"seq_lens\[1\] is -1"),
        ([4000, 20], r"seq_lens\[0\] is 4000; allowed: 0 to 96"),
        ([40, 1], "sequence 1 has 2 query rows but only 1 KV rows"),
    ]:
        batch = AttentionBatch(
            inputs.query_start_loc,
            torch.tensor(seq_lens, dtype=torch.int32),
            inputs.block_table,
            32,
        )
        with pytest.raises(ValueError, match=message):
            attend(inputs, batch=batch)
    for starts, message in [
        ([0, 2, 1], "decreases at sequence 1"),
        ([1, 2, 3], "allowed: 0"),
        ([0, 1, 2**31 - 1], r"query's rows is 3; allowed: 2147483647 \(the end of query_start_loc"),
    ]:
        for causal in (True, False):
            batch = AttentionBatch(
                torch.tensor(starts, dtype=torch.int32),
                torch.tensor([64, 64], dtype=torch.int32),
                inputs.block_table,
                32,
                causal=causal,
            )
            if causal and starts[-1] > 64:
                message_here = "query rows but only 64 KV rows"
            else:
                message_here = message
            with pytest.raises(ValueError, match=message_here):
                attend(inputs, batch=batch)


@pytest.mark.parametrize("length", [MAX_SEQ_LEN + 1, 2**31 - 1])
def test_sequences_longer_than_the_limit(length: int) -> None:
    """The block table would hold them: the limit is the kernels', and is told as such."""
    block_size = 2**26
    batch = AttentionBatch(
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        torch.zeros(1, 32, dtype=torch.int32),
        block_size,
    )
    query = torch.zeros(1, 1, 32)
    with pytest.raises(
        ValueError, match=rf"seq_lens\[0\] is {length}; allowed: 0 to {MAX_SEQ_LEN}"
    ):
        paged_attention(query, torch.empty(0, 1, block_size, 64), batch, query.clone(), scale=1.0)


def test_batch_tensors(inputs: Inputs) -> None:
    with pytest.raises(TypeError, match="seq_lens has dtype torch.int64; allowed: torch.int32"):
        AttentionBatch(inputs.query_start_loc, inputs.seq_lens.long(), inputs.block_table, 32)
    with pytest.raises(ValueError, match="query_start_loc's length is 2; allowed: 3"):
        AttentionBatch(inputs.query_start_loc[:2], inputs.seq_lens, inputs.block_table, 32)
    with pytest.raises(ValueError, match="block_table's shape"):
        AttentionBatch(inputs.query_start_loc, inputs.seq_lens, inputs.block_table[:1], 32)
    tables = (inputs.query_start_loc, inputs.seq_lens, inputs.block_table)
    for block_size in (7, 0, -16, 2**40):
        with pytest.raises(
            ValueError, match=rf"^block_size is {block_size}; allowed: multiples of 16"
        ):
            AttentionBatch(*tables, block_size)
    for block_size in (32.0, "32", None):
        with pytest.raises(TypeError, match=rf"^block_size is {block_size!r}; allowed: multiples"):
            AttentionBatch(*tables, block_size)
    with pytest.raises(TypeError, match="^causal is 'yes'; allowed: True or False"):
        AttentionBatch(*tables, 32, causal="yes")


def test_write_rejects_and_writes_nothing(inputs: Inputs) -> None:
    before = inputs.kv_cache.clone()
    rows = torch.ones(2, 2, 64)
    slots = torch.tensor([40, 0])
    num_slots = inputs.kv_cache.shape[0] * 32
    with pytest.raises(IndexError, match=rf"slot_mapping\[1\] is {num_slots}; allowed: below"):
        write_kv(rows, rows, inputs.kv_cache, torch.tensor([40, num_slots]))
    with pytest.raises(ValueError, match="slot_mapping's shape"):
        write_kv(rows, rows, inputs.kv_cache, slots[:1])
    with pytest.raises(TypeError, match="slot_mapping has dtype torch.int32"):
        write_kv(rows, rows, inputs.kv_cache, slots.int())
    with pytest.raises(TypeError, match="key has dtype torch.float16"):
        write_kv(rows.half(), rows, inputs.kv_cache, slots)
    with pytest.raises(ValueError, match="value's shape"):
        write_kv(rows, rows[:, :1], inputs.kv_cache, slots)
    assert torch.equal(inputs.kv_cache, before)


def test_negative_slots_are_skipped(inputs: Inputs) -> None:
    before = inputs.kv_cache.clone()
    rows = torch.ones(2, 2, 64)
    write_kv(rows, rows, inputs.kv_cache, torch.tensor([-1, -1]))
    assert torch.equal(inputs.kv_cache, before)


@pytest.mark.parametrize(
    ("first_rows", "message"),
    [
        ([0, -1], r"first_rows\[1\] is -1; allowed: 0 to 20 \(seq_lens\[1\]\)"),
        ([41, 0], r"first_rows\[0\] is 41; allowed: 0 to 40"),
        ([0], "first_rows' length is 1; allowed: 2"),
    ],
)
def test_wrong_first_rows(inputs: Inputs, first_rows: list[int], message: str) -> None:
    def attend_from(first_rows: torch.Tensor) -> None:
        table = (inputs.query_start_loc, inputs.seq_lens, inputs.block_table, 32)
        attend(inputs, batch=AttentionBatch(*table, first_rows=first_rows))

    with pytest.raises(ValueError, match=message):
        attend_from(torch.tensor(first_rows, dtype=torch.int32))


# Positions in the arguments of the native functions (bmc_core/_native.pyi).
ATTEND_BLOCK_SIZE, ATTEND_HEAD_SIZE, ATTEND_DTYPE, ATTEND_CACHE_TYPE = 12, 13, 14, 15
WRITE_BLOCK_SIZE, WRITE_HEAD_SIZE, WRITE_DTYPE, WRITE_CACHE_TYPE = 13, 14, 15, 16


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, 2, "the plan is for 3 query rows and blocks of 32, not for 2 and 32"),
        (ATTEND_BLOCK_SIZE, 64, "the plan is for 3 query rows and blocks of 32, not for 3 and 64"),
        (ATTEND_HEAD_SIZE, 40, "head size is 40; allowed: 32 to 256 in steps of 16"),
        (ATTEND_HEAD_SIZE, 512, "head size is 512; allowed: 32 to 256 in steps of 16"),
        (ATTEND_DTYPE, 3, "dtype code is 3; allowed: 0 to 2"),
        (ATTEND_CACHE_TYPE, -1, "cache type code is -1; allowed: 0 to 2"),
    ],
)
def test_native_attend_checks_again(inputs: Inputs, place: int, value: int, message: str) -> None:
    """A wrong call of the native module raises; it leaves nothing unwritten in silence."""
    out = torch.empty_like(inputs.query)
    plan = inputs.batch().plan(3, 4, 2, 0)
    arguments = [plan, 3, inputs.query.data_ptr(), 256, 64, out.data_ptr(), 256, 64]
    arguments += [inputs.kv_cache.data_ptr(), len(inputs.kv_cache), *inputs.kv_cache.stride()[:2]]
    arguments += [32, 64, 0, 0, inputs.scale, 1.0, 0.0, 0, 0]
    native.module().attend(*arguments)
    assert torch.equal(out, inputs.run())
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        native.module().attend(*arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (10, -1, "allowed: not negative"),
        (WRITE_BLOCK_SIZE, 0, "block_size is 0; allowed: multiples of 16"),
        (WRITE_HEAD_SIZE, 272, "head size is 272; allowed: 32 to 256"),
        (WRITE_DTYPE, 7, "dtype code is 7; allowed: 0 to 2"),
        (WRITE_CACHE_TYPE, 3, "cache type code is 3; allowed: 0 to 2"),
    ],
)
def test_native_write_checks_again(inputs: Inputs, place: int, value: int, message: str) -> None:
    rows = torch.ones(1, 2, 64)
    slots = torch.tensor([40])
    arguments = [rows.data_ptr(), 128, 64, rows.data_ptr(), 128, 64, inputs.kv_cache.data_ptr()]
    arguments += [*inputs.kv_cache.stride()[:2], slots.data_ptr(), 1, len(inputs.kv_cache), 2]
    arguments += [32, 64, 0, 0, 1.0, 1.0]
    native.module().write(*arguments)
    before = inputs.kv_cache.clone()
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        native.module().write(*arguments)
    assert torch.equal(inputs.kv_cache, before)
