"""Memory of a tensor that is about to go away, given back to the system piece by piece.

While a store grows, old and new tensor exist side by side. Giving back the old one's pages as soon
as they are copied keeps the resident memory at that of the new one.

Promises never to fail: where the system cannot do it, nothing happens, and the memory goes when the
tensor goes. Knows nothing of whether somebody still reads the tensor: the caller does.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

PAGE = mmap.PAGESIZE
PIECE = 8 << 20
"""Bytes that are worth a system call, and no more than what may exist twice."""

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def discard(tensor: torch.Tensor) -> None:
    """Gives back the whole pages inside a contiguous CPU tensor, whose content is lost."""
    if _libc is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    begin = -(-tensor.data_ptr() // PAGE) * PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    if end > begin:
        _libc.madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_DONTNEED)
        )
