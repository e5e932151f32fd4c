"""Inputs, layouts and the reference of the kernel benchmark."""

from dataclasses import replace

import pytest
import torch

from benchmarks.kernel import cases
from benchmarks.kernel.inputs import Inputs, layout
from benchmarks.lib.answers import relative_error
from tests.support.kernel_cases import tiny_case


def test_fp8_inputs_are_exact_and_only_peers_may_be_coarse() -> None:
    case = replace(tiny_case(), name="tiny fp8", cache="fp8_e4m3")
    inputs = Inputs(case)
    for rows in (inputs.key, inputs.value):
        assert torch.equal(rows.to(torch.float8_e4m3fn).to(rows.dtype), rows)
    assert case.row_bytes == case.kv_heads * case.head_size * 2
    assert case.tolerance(peer=False) == cases.TOLERANCE[case.dtype] < case.tolerance(peer=True)
    assert tiny_case().tolerance(peer=True) == cases.TOLERANCE[tiny_case().dtype]


def test_reference_is_attention() -> None:
    inputs = Inputs(tiny_case(dtype="float32", seq_lens=(9,), query_lens=(4,)), seed=1)
    query, key, value = (x.transpose(0, 1) for x in (inputs.query, inputs.key, inputs.value))
    mask = torch.ones(4, 9, dtype=torch.bool).tril(5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )
    assert relative_error(inputs.reference.transpose(0, 1), expected) < 1e-6
    assert relative_error(torch.full((2,), float("nan")), torch.ones(2)) == float("inf")


def test_inputs_are_fresh() -> None:
    assert not torch.equal(Inputs(tiny_case()).query, Inputs(tiny_case()).query)


@pytest.mark.parametrize("run_rows", [0, 32, 64, 128])
def test_layout_gives_every_row_a_place_of_its_own(run_rows: int) -> None:
    case = tiny_case(seq_lens=(300, 70, 1), query_lens=(1, 1, 1), run_rows=run_rows)
    table, slots, blocks = layout(replace(case, table_factor=3), 32, seed=5)
    assert table.shape == (3, 30)
    assert slots.unique().numel() == slots.numel() == 371
    assert slots.min() >= 32, "block 0 is nobody's"
    assert slots.max() < blocks * 32
    steps = slots[:300].diff()
    if run_rows:
        inside = steps[[i for i in range(299) if (i + 1) % run_rows]]
        assert (inside == 1).all()
    else:
        assert (steps == 1).all()
