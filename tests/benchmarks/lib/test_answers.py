"""Errors of answers: what is not a number never passes for a small one."""

import math

import pytest
import torch

from benchmarks.lib.answers import largest_error, relative_error

ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("out", "reference", "error"),
    [
        pytest.param(ONES * 1.5, ONES, 0.5, id="off by a half"),
        pytest.param(ONES * 0, ONES * 0, 0.0, id="zeros as they should be"),
        pytest.param(ONES, ONES * 0, math.inf, id="not the zeros that it should be"),
        pytest.param(ONES, ONES * math.nan, math.inf, id="a reference that is not a number"),
        pytest.param(ONES, ONES * math.inf, math.inf, id="a reference that is infinite"),
        pytest.param(ONES * math.inf, ONES * math.inf, math.inf, id="both infinite"),
        pytest.param(ONES * math.nan, ONES, math.inf, id="an answer that is not a number"),
        pytest.param(ONES[:1], ONES, math.inf, id="another shape"),
        pytest.param(ONES.bfloat16(), ONES.bfloat16(), 0.0, id="bfloat16"),
    ],
)
def test_relative_error(out: torch.Tensor, reference: torch.Tensor, error: float) -> None:
    assert relative_error(out, reference) == pytest.approx(error)


def test_an_error_that_is_not_a_number_is_the_largest() -> None:
    assert largest_error(1e-3, 2e-3) == 2e-3
    assert largest_error(1e-3, math.nan) == largest_error(math.nan, 1e-3) == math.inf
