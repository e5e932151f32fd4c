"""Pages under K and V: huge ones where the rows fill them, and pages given back piece by piece.

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
import sys
from pathlib import Path

import torch

PAGE = mmap.PAGESIZE
PIECE = 8 << 20
"""Bytes that are worth a system call, and no more than what may exist twice."""
DENSE = 3 / 4
"""From this share of valid rows on, a store's memory is worth huge pages."""

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_HUGE_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


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
        return int(_HUGE_PAGE.read_text())
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
