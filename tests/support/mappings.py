"""What Linux says of the mapping that a tensor lies in."""

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
