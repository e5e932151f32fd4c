"""The packed layout: growth in place, the room behind the rows, attention, what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from bmc_core import native
from bmc_core.kv_store import PackedStore, why_not_packed
from bmc_core.policy import BMCPolicy
from tests.support.stores import SIZE, filled, random_rows


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "dtype", "rows", "r"),
    [(1, torch.float32, 1, 16), (3, torch.bfloat16, 100, 16), (40, torch.bfloat16, 700, 240)],
)
def test_rows_move_up_where_they_are(
    batch: int, dtype: torch.dtype, rows: int, r: int, threads: int
) -> None:
    """Growths within the room behind the rows keep the memory, its content and nothing twice."""
    store = PackedStore(BMCPolicy(r=r))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        filled = [random_rows(batch, rows, dtype)]
        store.append(*filled[0])
        place, capacity = store.tensor().data_ptr(), store.capacity
        while store.capacity + r <= 2 * capacity:
            filled.append(random_rows(batch, store.capacity - store.length + 1, dtype))
            store.append(*filled[-1])
            assert store.tensor().data_ptr() == place
            assert store.counters.bytes_peak == store.num_bytes == store.counters.bytes_held
        assert store.counters.growths >= 2
        for held, part in ((store.keys(), 0), (store.values(), 1)):
            assert torch.equal(held, torch.cat([pair[part] for pair in filled], dim=2))
    finally:
        torch.set_num_threads(before)


def test_room_is_no_more_than_the_expected_rows() -> None:
    store = PackedStore(BMCPolicy(r=32), limit=90)
    store.append(*random_rows(2, 60))
    assert store.tensor().untyped_storage().nbytes() == 96 * store.row_bytes
    assert copy.deepcopy(store).tensor().untyped_storage().nbytes() == 64 * store.row_bytes
    assert pickle.loads(pickle.dumps(store)).tensor().untyped_storage().nbytes() <= (
        96 * store.row_bytes
    )


def test_a_wrong_growth_in_place_is_refused() -> None:
    memory = torch.zeros(100, dtype=torch.uint8)
    for wrong in ((2, 11, 10, 20), (2, 10, 20, 10), (2, 10, 10, 51), (-1, 1, 1, 1)):
        with pytest.raises(ValueError, match="allowed: bytes <= old stride <= new stride"):
            native.module().grow_in_place(memory.data_ptr(), 100, *wrong)


def test_attention_sees_what_the_arguments_say() -> None:
    torch.manual_seed(0)
    store = filled(PackedStore(BMCPolicy(r=32)), batch=2, rows=50)
    query = torch.randn(2, 4, 3, SIZE)
    first = torch.tensor([0, 7], dtype=torch.int32)
    out = store.attend(query, scale=0.3, rows=45, first_rows=first, sliding_window=41)
    key_rows, query_rows = torch.arange(50), torch.arange(47, 50)
    visible = key_rows <= query_rows[:, None]
    visible &= key_rows > query_rows[:, None] - 41
    mask = visible & (key_rows >= (5 + first)[:, None, None, None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, store.keys(), store.values(), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_what_the_packed_layout_cannot_hold_is_said() -> None:
    key, value = random_rows(1, 1)
    assert why_not_packed(key, value) is None
    assert "float64" in str(why_not_packed(key.double(), value.double()))
    assert "40" in str(why_not_packed(*random_rows(1, 1, size=40)))
    assert "differ" in str(why_not_packed(key, random_rows(1, 1, size=48)[1]))
    assert "meta" in str(why_not_packed(key.to("meta"), value.to("meta")))
    with pytest.raises(ValueError, match="K is torch.float32 and V is torch.bfloat16"):
        PackedStore(BMCPolicy()).append(key, value.bfloat16())
    with pytest.raises(ValueError, match='layout "packed" is not possible: the head size is 40'):
        PackedStore(BMCPolicy()).append(*random_rows(1, 1, size=40))
