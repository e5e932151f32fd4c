"""Rows that move inside their tensors, a few heads at a time, through one buffer.

Promises that all memory is taken before the first row moves: who calls moves all rows of all
tensors, or finds no memory and moves none. Knows nothing of stores and of what the rows mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

BUFFER_BYTES = 4 << 20
"""Rows that move in place go through a buffer of about this size, small enough to stay in cache."""


def move_to_front(parts: Sequence[torch.Tensor], first: int, end: int) -> None:
    """Elements [first, end) of dimension 2 of each part move to its beginning."""
    kept = end - first
    if kept <= 8 * first:  # a few pieces, of which none overlaps where it goes
        for part in parts:
            for begin in range(0, kept, first):
                count = min(first, kept - begin)
                part.narrow(2, begin, count).copy_(part.narrow(2, begin + first, count))
        return
    for piece, copy in _beside_copies([part.narrow(2, 0, end) for part in parts], kept):
        copy.copy_(piece.narrow(2, first, kept))
        piece.narrow(2, 0, kept).copy_(copy)


def reorder_in_place(parts: Sequence[torch.Tensor], indices: torch.Tensor) -> None:
    """Along dimension 0 of each part, entry i becomes what `indices[i]` was.

    Parts may differ in shape, dtype and device; all have as many entries as there are indices.
    """
    on_device = {device: indices.to(device) for device in {part.device for part in parts}}
    for piece, copy in _beside_copies(parts):
        torch.index_select(piece, 0, on_device[piece.device], out=copy)
        piece.copy_(copy)


def _beside_copies(
    parts: Sequence[torch.Tensor], count: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A few heads (dimension 1) of a part at a time, and contiguous memory for `count` of their
    elements along dimension 2 (None: for all).

    It is always the same memory, taken before the first piece is handed out.
    """
    heads, needed = [], dict.fromkeys((part.device for part in parts), 0)
    for part in parts:
        elements = part.shape[2] if count is None else count
        head_bytes = part.itemsize * math.prod((part.shape[0], elements, *part.shape[3:]))
        heads.append(max(1, min(part.shape[1], BUFFER_BYTES // max(1, head_bytes))))
        needed[part.device] = max(needed[part.device], heads[-1] * head_bytes)
    # Bytes, since the parts may differ in dtype.
    buffers = {
        device: torch.empty(num_bytes, dtype=torch.uint8, device=device)
        for device, num_bytes in needed.items()
    }
    for part, step in zip(parts, heads, strict=True):
        buffer = buffers[part.device]
        for begin in range(0, part.shape[1], step):
            piece = part[:, begin : begin + step]
            batch, taken, elements, *rest = piece.shape
            shape = (batch, taken, elements if count is None else count, *rest)
            num_bytes = math.prod(shape) * part.itemsize
            yield piece, buffer[:num_bytes].view(part.dtype).view(shape)
