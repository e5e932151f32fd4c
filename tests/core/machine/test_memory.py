"""Huge pages where rows fill them, pages given back; what the system says of them."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from bmc_core.kv_store import PackedStore, RowsStore
from bmc_core.machine import memory
from bmc_core.policy import BMCPolicy
from tests.support.mappings import wants_huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
needs_huge_pages = pytest.mark.skipif(
    not memory.huge_page_bytes(), reason="this kernel was built without transparent huge pages"
)


def fresh(num_bytes: int) -> torch.Tensor:
    """Memory of its own: what `torch.empty` gives may be what an earlier test has advised."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


@needs_huge_pages
def test_large_tensors_ask_for_huge_pages() -> None:
    tensor = fresh(64 << 20)
    assert not wants_huge_pages(tensor)
    memory.prefer_huge_pages(tensor)
    assert wants_huge_pages(tensor)


@needs_huge_pages
def test_what_cannot_have_huge_pages_is_left_alone() -> None:
    wide = fresh(64 << 20)
    memory.prefer_huge_pages(wide[::2])
    memory.prefer_huge_pages(wide[: memory.huge_page_bytes()])
    assert not wants_huge_pages(wide)
    memory.prefer_huge_pages(torch.empty(1 << 30, device="meta"))
    memory.prefer_huge_pages(torch.empty(0))


def test_discard_gives_whole_pages_back() -> None:
    tensor = torch.ones(40 * memory.PAGE, dtype=torch.uint8)
    part = tensor[10:-10]
    memory.discard(part)
    assert tensor[:10].all()
    assert tensor[-10:].all()
    assert int(tensor.sum()) <= 2 * memory.PAGE
    memory.discard(torch.empty(10, device="meta"))


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


GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 8 GiB free, and control groups to be filled in."""
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "groups")
    return tmp_path


def group(folder: Path, version: int, limit: object, used: int, file_pages: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    for name, value in zip(names, (limit, used), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    total = {1: "total_", 2: ""}[version]
    used_lately = file_pages // 4
    (folder / "memory.stat").write_text(
        f"anon 5\n{total}inactive_file {file_pages - used_lately}\n"
        f"{total}active_file {used_lately}\n"
    )


def test_free_memory_without_groups(system: Path) -> None:
    assert memory.available_bytes() == 8 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_in_a_control_group(system: Path, version: int) -> None:
    """The tightest group above the process counts; file pages can be taken back."""
    line = "0::/a/b\n" if version == 2 else "5:cpu:/a/b\n4:cpuset,memory:/a/b\n"
    (system / "cgroup").write_text(line)
    root = system / "groups" if version == 2 else system / "groups" / "memory"
    group(root / "a" / "b", version, "max" if version == 2 else 1 << 62, GIB)
    group(root / "a", version, 3 * GIB, 2 * GIB, file_pages=GIB)
    assert memory.available_bytes() == 2 * GIB
    group(root / "a" / "b", version, GIB, 2 * GIB)
    assert memory.available_bytes() == 0, "over its limit"


def test_a_group_whose_path_is_the_hosts(system: Path) -> None:
    (system / "cgroup").write_text("0::/not/mounted/here\n")
    group(system / "groups", 2, GIB, 0)
    assert memory.available_bytes() == GIB


@pytest.mark.parametrize("text", ["nonsense", "0::", "0:", "", "::::", "0::/a\n4"])
def test_odd_lines_about_groups_are_left_out(system: Path, text: str) -> None:
    (system / "cgroup").write_text(text)
    assert memory.available_bytes() == 8 * GIB
    (system / "cgroup").write_bytes(b"0::/\xff\xfe")
    assert memory.available_bytes() == 8 * GIB


def test_file_pages_of_the_groups_below_count(system: Path) -> None:
    """Version 1 tells its own in front of the total."""
    (system / "cgroup").write_text("4:memory:/a\n")
    folder = system / "groups" / "memory" / "a"
    group(folder, 1, 3 * GIB, 2 * GIB)
    (folder / "memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {GIB}\n")
    assert memory.available_bytes() == 2 * GIB
