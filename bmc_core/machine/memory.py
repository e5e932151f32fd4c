"""Memory: how much is free, huge pages under K and V, and pages given back piece by piece.

Attention over K and V reads more memory than any cache of page translations covers: with pages of
2 MiB instead of 4 KiB it read up to 18 % faster (docs/kernel-log.md). A huge page is resident as
a whole once any byte of it is written, so that they are for memory that rows will fill.

While a store grows, old and new tensor exist side by side. Giving back the old one's pages as soon
as they are copied keeps the resident memory at that of the new one.

Promises never to fail: where the system cannot do it, nothing happens. Knows nothing of whether
somebody still reads a tensor that is discarded: the caller does.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAGE = mmap.PAGESIZE
PIECE = 8 << 20
"""Bytes that are worth a system call, and no more than what may exist twice."""
DENSE = 3 / 4
"""From this share of valid rows on, a store's memory is worth huge pages."""

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
GROUPS_OF_PROCESS = Path("/proc/self/cgroup")

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def available_bytes() -> int:
    """Bytes that can be taken without swapping, within the control groups of this process; 0 where
    the system does not tell."""
    return max(0, min([_system_bytes(), *_control_groups_leave()]))


def _system_bytes() -> int:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _control_groups_leave() -> list[int]:
    """What each limited control group leaves: this process's own, and every one above it."""
    try:
        lines = GROUPS_OF_PROCESS.read_text().splitlines()
    except (OSError, ValueError):
        return []
    left = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "", "")[:3]
        if not path.startswith("/"):
            continue
        if controllers == "":
            mount, limit, used = CONTROL_GROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount = CONTROL_GROUPS / "memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, and only its end or nothing of it is mounted.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                left.append(_group_leaves(folder, limit, used))
    return [value for value in left if value is not None]


def _group_leaves(folder: Path, limit: str, used: str) -> int | None:
    """None: no limit. File pages can be taken back, and are free."""
    try:
        bound = int((folder / limit).read_text())  # "max": no limit
        taken = int((folder / used).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        counts = dict(line.split(None, 1) for line in lines)
        # Version 1 has a total over the groups below; version 2 counts them anyway.
        for name in ("inactive_file", "active_file"):
            taken -= int(counts.get(f"total_{name}", counts.get(name, 0)))
    except (OSError, ValueError):
        return None
    return max(0, bound - max(0, taken))


def huge_pages_setting() -> str:
    """When the system gives huge pages: "always", "madvise" (when asked), "never" or "unknown"."""
    try:
        text = (_HUGE_PAGES / "enabled").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Asks for huge pages under a contiguous CPU tensor that was not written yet.

    The system may be set to use them always, when asked (the usual setting) or never.
    """
    if fits_huge_pages(tensor.nbytes):
        _advise(tensor, huge_page_bytes(), getattr(mmap, "MADV_HUGEPAGE", None))


def fits_huge_pages(num_bytes: int) -> bool:
    """Whether memory of that size can be on huge pages here."""
    size = huge_page_bytes()
    return size > 0 and num_bytes >= 2 * size


def discard(tensor: torch.Tensor) -> None:
    """Gives back the whole pages inside a contiguous CPU tensor, whose content is lost."""
    _advise(tensor, PAGE, getattr(mmap, "MADV_DONTNEED", None))


@functools.cache
def huge_page_bytes() -> int:
    """Bytes of a transparent huge page; 0: this system has none."""
    try:
        return int((_HUGE_PAGES / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _advise(tensor: torch.Tensor, page: int, advice: int | None) -> None:
    """`madvise` for the whole pages inside the tensor."""
    if _libc is None or advice is None:
        return
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > begin:
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))
