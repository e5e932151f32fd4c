"""What tensors share, lack or would lose: refused by name, or answered right."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from bmc_core.attention import AttentionBatch, write_kv
from tests.support.odd_tensors import (
    fake,
    freed,
    freed_with_an_offset,
    negated,
    on_meta,
    shrunk,
    shrunk_with_gaps,
    sparse,
    with_history,
)
from tests.support.reference import Case, Inputs
from tests.support.small_batch import attend, small_inputs


@pytest.fixture
def inputs() -> Inputs:
    return small_inputs()


def test_overlapping_memory(inputs: Inputs) -> None:
    """What is written must not lie on itself; what is only read may."""
    for out in (
        torch.empty(1, 4, 64).expand(3, 4, 64),
        torch.empty(3, 1, 64).expand(3, 4, 64),
        torch.empty(1000).as_strided((3, 4, 64), (100, 32, 1)),
    ):
        with pytest.raises(ValueError, match="out's strides is .*; allowed: rows that do not over"):
            attend(inputs, out=out)
    inputs.query = inputs.query[:1].expand(3, 4, 64)
    expected = inputs.reference()
    torch.testing.assert_close(inputs.run(), expected)
    rows = torch.ones(2, 2, 64)
    overlapping = inputs.kv_cache[:1].expand_as(inputs.kv_cache)
    with pytest.raises(ValueError, match="kv_cache's strides is .*; allowed: blocks that do not"):
        write_kv(rows, rows, overlapping, torch.tensor([0, 32]))


def test_strides_of_a_fused_buffer_do_not_overlap(inputs: Inputs) -> None:
    """Heads before tokens, and rows with others between them: both are views that callers hand."""
    expected = inputs.run()
    for out in (torch.empty(4, 3, 64).transpose(0, 1), torch.empty(3, 12, 64)[:, 4:8]):
        attend(inputs, out=out, scale=inputs.scale)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_out_may_be_the_query(tokens: int) -> None:
    """The same rows in the same places, as one tensor or as two."""
    inputs = Inputs(Case(seq_lens=[700], query_lens=[tokens], poison=0.0))
    expected = inputs.run()
    attend(inputs, query=(query := inputs.query.clone()), out=query, scale=inputs.scale)
    assert torch.equal(query, expected)
    rows = torch.empty(tokens, 9, 64)[:, 2:6].copy_(inputs.query)
    other = rows.as_strided(rows.shape, (rows.stride(0) if tokens > 1 else 7, 64, 1))
    attend(inputs, query=rows, out=other, scale=inputs.scale)
    assert torch.equal(rows, expected)


def test_out_may_lie_between_the_query_rows(inputs: Inputs) -> None:
    expected = inputs.run()
    for first, second in ((0, 4), (4, 0), (8, 3)):
        buffer = torch.zeros(3, 12, 64)
        query, out = buffer[:, first : first + 4], buffer[:, second : second + 4]
        attend(inputs, query=query.copy_(inputs.query), out=out, scale=inputs.scale)
        assert torch.equal(out, expected)


def test_out_on_what_is_read(inputs: Inputs) -> None:
    """What is written would be read again in place of the caller's values."""
    flat = torch.zeros(5 * 4 * 64)
    rows = flat.view(5, 4, 64)
    wide = torch.zeros(3, 12, 64)
    for query, out in (
        (rows[1:4], rows[:3]),
        (rows[:3], rows[2:5]),
        (flat[:768].view(3, 4, 64), flat[1:769].view(3, 4, 64)),
        (flat[:768].view(3, 4, 64), flat[:768].view(4, 3, 64).transpose(0, 1)),
        (flat[:64].expand(3, 4, 64), flat[:768].view(3, 4, 64)),
        (wide[:, 0:4], wide[:, 3:7]),
        (wide[:, 8:12], wide[:, 5:9]),
    ):
        with pytest.raises(ValueError, match="^out shares memory with query; allowed: memory of"):
            attend(inputs, query=query, out=out)
    before = inputs.kv_cache.clone()
    cached = inputs.kv_cache.view(-1)
    for first in (0, cached.numel() - 768):
        with pytest.raises(ValueError, match="^out shares memory with kv_cache"):
            attend(inputs, out=cached[first : first + 768].view(3, 4, 64))
    for name in ("sinks", "alibi_slopes"):
        with pytest.raises(ValueError, match=f"^out shares memory with {name}"):
            attend(inputs, out=rows[:3], **{name: flat[764:768]})
        attend(inputs, out=rows[:3], **{name: flat[768:772]})
    assert torch.equal(inputs.kv_cache, before)


def test_rows_to_write_that_are_the_cache(inputs: Inputs) -> None:
    before = inputs.kv_cache.clone()
    cached = inputs.kv_cache.view(-1)[100:356].view(2, 2, 64)
    rows = torch.ones(2, 2, 64)
    slots = torch.tensor([33, 34])
    with pytest.raises(ValueError, match="^key shares memory with kv_cache; allowed: memory of"):
        write_kv(cached, rows, inputs.kv_cache, slots)
    with pytest.raises(ValueError, match="^value shares memory with kv_cache"):
        write_kv(rows, cached, inputs.kv_cache, slots)
    assert torch.equal(inputs.kv_cache, before)
    write_kv(rows, rows, inputs.kv_cache, slots)  # one tensor may be both: it is only read
    assert not torch.equal(inputs.kv_cache, before)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (negated, "has its negative bit set"),
        (fake, "is a FakeTensor without memory"),
        (freed, "is a Tensor without memory"),
        (freed_with_an_offset, "is a Tensor without memory"),
        (shrunk, "has shape .* which end at byte .* allowed: a tensor within its storage"),
        (shrunk_with_gaps, "has shape .* which end at byte .* allowed: a tensor within its"),
        (on_meta, "is on device meta; allowed: cpu"),
        (sparse, "is a Tensor without memory"),
    ],
)
def test_tensors_whose_memory_is_not_their_values(inputs: Inputs, change, message: str) -> None:
    """Every tensor argument is refused by its name, and nothing is read or written."""
    arguments = {
        "query": inputs.query,
        "kv_cache": inputs.kv_cache,
        "out": torch.zeros_like(inputs.query),
        "alibi_slopes": torch.ones(4),
        "sinks": torch.ones(4),
    }
    before = inputs.kv_cache.clone()
    for name in arguments:
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            attend(inputs, **{**arguments, name: change(arguments[name])})
    rows = torch.ones(2, 2, 64)
    written = {
        "key": rows,
        "value": rows,
        "kv_cache": inputs.kv_cache,
        "slot_mapping": torch.tensor([33, 34]),
    }
    for name in written:
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            write_kv(**{**written, name: change(written[name])})
    tables = {
        "query_start_loc": inputs.query_start_loc,
        "seq_lens": inputs.seq_lens,
        "block_table": inputs.block_table,
        "first_rows": torch.zeros_like(inputs.seq_lens),
    }
    for name in tables:
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            AttentionBatch(**{**tables, name: change(tables[name])}, block_size=32)
    assert torch.equal(inputs.kv_cache, before)
    assert (arguments["out"] == 0).all()


def test_transformed_tensors_are_refused(inputs: Inputs) -> None:
    def attend_one(query: torch.Tensor) -> torch.Tensor:
        attend(inputs, query=query)
        return query

    with pytest.raises(ValueError, match="query is a Tensor without memory of its own"):
        torch.vmap(attend_one)(inputs.query[None])


def test_subclasses_and_parameters_with_memory_are_accepted(inputs: Inputs) -> None:
    class Named(torch.Tensor):
        pass

    expected = inputs.run()
    frozen = torch.nn.Parameter(inputs.query, requires_grad=False)
    for query in (inputs.query.as_subclass(Named), frozen):
        out = torch.empty_like(inputs.query)
        attend(inputs, query=query, out=out, scale=inputs.scale)
        assert torch.equal(out, expected)


def test_gradients_are_refused_where_they_would_be_lost(inputs: Inputs) -> None:
    """By every argument that has them; without grad mode there are none to lose."""
    rows = torch.ones(2, 2, 64)
    read = {"query": inputs.query, "kv_cache": inputs.kv_cache, "sinks": torch.ones(4)}
    read |= {"alibi_slopes": torch.ones(4), "out": torch.zeros_like(inputs.query)}
    written = {"key": rows, "value": rows, "kv_cache": inputs.kv_cache.clone()}
    slots = torch.tensor([33, 34])
    expected = torch.empty_like(inputs.query)
    attend(inputs, **{**read, "out": expected})
    for arguments, call in ((read, attend), (written, write_kv)):
        first = {"inputs": inputs} if call is attend else {"slot_mapping": slots}
        for name in arguments:
            changed = {**first, **arguments, name: with_history(arguments[name])}
            with pytest.raises(
                ValueError, match=rf"^{name} requires gradients, .*allowed: .*torch.no_grad\(\)"
            ):
                call(**changed)
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    call(**changed)
                if call is attend:
                    assert torch.equal(changed["out"], expected)


def test_forward_mode_tangents_are_refused(inputs: Inputs) -> None:
    expected = inputs.run()
    out = torch.empty_like(expected)
    rows = torch.ones(2, 2, 64)
    with forward_ad.dual_level():
        query = forward_ad.make_dual(inputs.query, torch.ones_like(inputs.query))
        with torch.no_grad(), pytest.raises(ValueError, match="^query carries a forward-mode tan"):
            attend(inputs, query=query)
        with pytest.raises(ValueError, match="^key carries a forward-mode tangent.*allowed: .*det"):
            write_kv(
                forward_ad.make_dual(rows, rows), rows, inputs.kv_cache, torch.tensor([40, 41])
            )
        attend(inputs, query=query.detach(), out=out, scale=inputs.scale)
        assert torch.equal(out, expected)
        with torch.inference_mode():
            attend(inputs, query=query, out=out.zero_(), scale=inputs.scale)
        assert torch.equal(out, expected)


def test_batch_tensors_that_change_before_they_are_read(inputs: Inputs) -> None:
    """Shapes and memory are checked when the first layer reads them, not only at the beginning."""
    first_rows = torch.zeros(2, dtype=torch.int32)
    for name, change, message in (
        ("seq_lens", lambda t: t.resize_(50_000_000), "^query_start_loc's length is 3; allowed: 5"),
        ("seq_lens", lambda t: t.untyped_storage().resize_(4), "^seq_lens has shape .* end at"),
        ("query_start_loc", lambda t: t.resize_(2), "^query_start_loc's length is 2; allowed: 3"),
        ("block_table", lambda t: t.resize_(1, 3), "^block_table's shape is .*; allowed: at least"),
        ("block_table", lambda t: t.untyped_storage().resize_(0), "^block_table is a Tensor with"),
        ("first_rows", lambda t: t.resize_(1), "^first_rows' length is 1; allowed: 2"),
    ):
        tensors = {
            "query_start_loc": inputs.query_start_loc.clone(),
            "seq_lens": inputs.seq_lens.clone(),
            "block_table": inputs.block_table.clone(),
            "first_rows": first_rows.clone(),
        }
        batch = AttentionBatch(**tensors, block_size=32)
        read = AttentionBatch(**tensors, block_size=32)
        attend(inputs, batch=read)
        change(tensors[name])
        with pytest.raises(ValueError, match=message):
            attend(inputs, batch=batch)
        out = torch.empty_like(inputs.query)
        attend(inputs, batch=read, out=out, scale=inputs.scale)  # what was read stays
        assert torch.equal(out, inputs.run())
