"""What Linux says of the memory that a tensor lies in."""

import ctypes
import mmap
from pathlib import Path

import torch


def wants_huge_pages(tensor: torch.Tensor) -> bool:
    """Whether the mapping in the middle of the tensor asks for huge pages."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("the tensor is in no mapping")


def resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the whole pages under the tensor's storage that are in memory (mincore)."""
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (storage.data_ptr() + storage.nbytes() - begin) // mmap.PAGESIZE
    resident = (ctypes.c_ubyte * pages)()
    address, length = ctypes.c_void_p(begin), ctypes.c_size_t(pages * mmap.PAGESIZE)
    failed = ctypes.CDLL(None, use_errno=True).mincore(address, length, resident)
    assert not failed, f"mincore: errno {ctypes.get_errno()}"
    return sum(page & 1 for page in resident) * mmap.PAGESIZE
