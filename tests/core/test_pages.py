"""Huge pages where rows fill them, pages given back; what the system says of them."""

import sys

import pytest
import torch
from mappings import wants_huge_pages

from bmc_core import pages
from bmc_core.kv_store import PackedStore, RowsStore
from bmc_core.policy import BMCPolicy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
needs_huge_pages = pytest.mark.skipif(
    not pages.huge_page_bytes(), reason="this kernel was built without transparent huge pages"
)


@needs_huge_pages
def test_large_tensors_ask_for_huge_pages() -> None:
    tensor = torch.empty(64 << 20, dtype=torch.uint8)
    assert not wants_huge_pages(tensor)
    pages.prefer_huge_pages(tensor)
    assert wants_huge_pages(tensor)


@needs_huge_pages
def test_what_cannot_have_huge_pages_is_left_alone() -> None:
    wide = torch.empty(64 << 20, dtype=torch.uint8)
    pages.prefer_huge_pages(wide[::2])
    pages.prefer_huge_pages(wide[: pages.huge_page_bytes()])
    assert not wants_huge_pages(wide)
    pages.prefer_huge_pages(torch.empty(1 << 30, device="meta"))
    pages.prefer_huge_pages(torch.empty(0))


def test_discard_gives_whole_pages_back() -> None:
    tensor = torch.ones(40 * pages.PAGE, dtype=torch.uint8)
    part = tensor[10:-10]
    pages.discard(part)
    assert tensor[:10].all()
    assert tensor[-10:].all()
    assert int(tensor.sum()) <= 2 * pages.PAGE
    pages.discard(torch.empty(10, device="meta"))


@needs_huge_pages
@pytest.mark.parametrize("layout", [RowsStore, PackedStore])
def test_stores_use_huge_pages_where_rows_fill_them(layout: type) -> None:
    """Spare rows of a huge page are in memory at once: not for a store that is mostly spare."""
    store = layout(BMCPolicy(r=2048))
    rows = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).expand(64, 16, 1600, 64)
    store.append(rows[:, :, :64], rows[:, :, :64])  # 64 of 2048
    assert store.capacity == 2048
    assert not wants_huge_pages(held(store))
    store.append(rows, rows)
    store.append(rows, rows)  # 3264 of 4096
    assert store.capacity == 4096
    assert wants_huge_pages(held(store))
    store.select(torch.arange(32))
    assert wants_huge_pages(held(store))
    assert torch.equal(store.keys(), torch.zeros_like(store.keys()))


def held(store: RowsStore | PackedStore) -> torch.Tensor:
    return store.tensor() if isinstance(store, PackedStore) else store._tensors()[0]
