"""Attention of several query rows over the same context, timed."""

import pytest
import torch

from bmc_core.costs.verification import seconds_per_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_every_number_of_rows_has_a_price(dtype: torch.dtype) -> None:
    found = seconds_per_row(4, 2, 32, dtype, (1, 2, 5), seconds=0.05, most=1 << 20)
    assert list(found) == [1, 2, 5]
    assert all(0 < seconds < 1e-3 for seconds in found.values())


def test_no_time_is_enough_for_one_round() -> None:
    assert list(seconds_per_row(2, 2, 32, torch.float32, (1, 9), seconds=0.0, most=1)) == [1, 9]


def test_refuses_what_the_kernel_does_not_take() -> None:
    with pytest.raises(ValueError, match="last dimension"):
        seconds_per_row(2, 2, 40, torch.float32, (1,), most=1 << 20)
