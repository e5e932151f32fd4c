"""The layout of plain rows: views of the valid ones, any size and dtype."""

from __future__ import annotations

import pytest
import torch

from bmc_core.kv_store import RowsStore
from bmc_core.policy import BMCPolicy
from tests.support.stores import HEADS, SIZE, filled, random_rows


def test_plain_rows_are_views_of_the_valid_rows() -> None:
    store = filled(RowsStore(BMCPolicy(r=64)))
    assert store.keys().shape == (3, HEADS, 40, SIZE)
    assert store.keys().untyped_storage().nbytes() == 3 * HEADS * 64 * SIZE * 4


def test_k_and_v_of_plain_rows_may_differ_in_size_and_be_of_any_dtype() -> None:
    store = RowsStore(BMCPolicy(r=8))
    key = torch.randn(2, 3, 5, 24, dtype=torch.float64)
    value = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    store.append(key, value)
    store.append(key, value)
    assert torch.equal(store.keys(), torch.cat((key, key), dim=2))
    assert torch.equal(store.values(), torch.cat((value, value), dim=2))


def test_k_and_v_of_plain_rows_may_differ_in_dtype() -> None:
    store = RowsStore(BMCPolicy(r=32))
    key, value = random_rows(3, 40)
    value = value.bfloat16()
    store.append(key, value)
    assert store.row_bytes == 3 * HEADS * SIZE * (4 + 2)
    assert store.num_bytes == store.counters.bytes_held == 64 * store.row_bytes
    more, added = random_rows(3, 50)
    assert store.append(more, added.bfloat16(), keep=38) == 2  # through the buffer of a slide
    store.reorder(torch.tensor([2, 0, 0]))
    for held, old, new in ((store.keys(), key, more), (store.values(), value, added.bfloat16())):
        assert held.dtype == old.dtype
        assert torch.equal(held, torch.cat((old[:, :, 2:], new), dim=2)[[2, 0, 0]])
    with pytest.raises(ValueError, match=r"value \(3, .*\) of torch.float32 .* of torch.bfloat16"):
        store.append(*random_rows(3, 1))
