"""Memory for rows: what every layout's tensors are made of.

Promises tensors that may be written wherever they were made, and memory that is taken only where
rows are written. Knows nothing of layouts.
"""

from __future__ import annotations

import math
import sys

import torch

from bmc_core.machine.memory import prefer_huge_pages


def new_tensor(shape: tuple[int, ...], like: torch.Tensor, *, dense: bool) -> torch.Tensor:
    """Uninitialized memory that may be written inside and outside `torch.inference_mode`.

    `dense`: whether most of it will soon be written. What is not written takes no memory, also
    under `torch.use_deterministic_algorithms`, where `torch.empty` would fill it.

    Raises:
        RuntimeError: no memory.
    """
    num_bytes = math.prod(shape) * like.element_size()
    if num_bytes > sys.maxsize:
        raise RuntimeError(f"can't allocate {num_bytes} bytes, a tensor of shape {shape}")
    with torch.inference_mode(False):
        storage = torch.UntypedStorage(num_bytes, device=like.device)
        tensor = torch.empty(0, dtype=like.dtype, device=like.device).set_(storage).view(shape)
    if dense:
        prefer_huge_pages(tensor)
    return tensor
