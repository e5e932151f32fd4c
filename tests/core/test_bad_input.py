"""Bad input raises an exception that names what and why; the process goes on."""

from __future__ import annotations

import pytest
import torch

from bmc_core.attention import AttentionBatch, paged_attention, write_kv
from tests.support.reference import Case, Inputs


@pytest.fixture
def inputs() -> Inputs:
    return Inputs(Case(seq_lens=[40, 20], query_lens=[1, 2], poison=0.0))


def attend(inputs: Inputs, **changes) -> None:
    arguments = {
        "query": inputs.query,
        "kv_cache": inputs.kv_cache,
        "batch": inputs.batch(),
        "out": torch.empty_like(inputs.query),
        "scale": 1.0,
    }
    paged_attention(**{**arguments, **changes})


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
    with pytest.raises(TypeError, match="alibi_slopes has dtype torch.float64"):
        attend(inputs, alibi_slopes=torch.zeros(4, dtype=torch.float64))


def test_wrong_shapes(inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="query's head size is 32; allowed: 64"):
        attend(inputs, query=inputs.query[..., :32].contiguous())
    with pytest.raises(ValueError, match="query has shape"):
        attend(inputs, query=inputs.query.flatten(1))
    with pytest.raises(ValueError, match="query's rows is 2; allowed: 3"):
        attend(inputs, query=inputs.query[:2], out=torch.empty_like(inputs.query[:2]))
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


def test_wrong_strides(inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="query has strides"):
        attend(inputs, query=inputs.query.transpose(1, 2).contiguous().transpose(1, 2))
    row_major = inputs.kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="kv_cache has strides .* head-major"):
        attend(inputs, kv_cache=row_major)


def test_wrong_settings(inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="sliding_window is 0; allowed: a positive number"):
        attend(inputs, sliding_window=0)
    with pytest.raises(ValueError, match="logits_soft_cap is -1"):
        attend(inputs, logits_soft_cap=-1.0)
    batch = AttentionBatch(
        inputs.query_start_loc, inputs.seq_lens, inputs.block_table, 32, causal=False
    )
    with pytest.raises(ValueError, match="sliding_window needs causal"):
        attend(inputs, batch=batch, sliding_window=4)


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
    for starts, message in [([0, 2, 1], "decreases at sequence 1"), ([1, 2, 3], "allowed: 0")]:
        batch = AttentionBatch(
            torch.tensor(starts, dtype=torch.int32), inputs.seq_lens, inputs.block_table, 32
        )
        with pytest.raises(ValueError, match=message):
            attend(inputs, batch=batch)


def test_batch_tensors(inputs: Inputs) -> None:
    with pytest.raises(TypeError, match="seq_lens has dtype torch.int64; allowed: torch.int32"):
        AttentionBatch(inputs.query_start_loc, inputs.seq_lens.long(), inputs.block_table, 32)
    with pytest.raises(ValueError, match="query_start_loc's length is 2; allowed: 3"):
        AttentionBatch(inputs.query_start_loc[:2], inputs.seq_lens, inputs.block_table, 32)
    with pytest.raises(ValueError, match="block_table's shape"):
        AttentionBatch(inputs.query_start_loc, inputs.seq_lens, inputs.block_table[:1], 32)
    batch = AttentionBatch(inputs.query_start_loc, inputs.seq_lens, inputs.block_table, 7)
    with pytest.raises(ValueError, match="block_size is 7"):
        attend(inputs, batch=batch)


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
