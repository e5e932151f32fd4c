"""Tensors whose memory does not hold their values, or which would lose a gradient: one function for
each kind, from a tensor that is in order."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode


def negated(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(tensor)


def fake(tensor: torch.Tensor) -> torch.Tensor:
    return FakeTensorMode().from_tensor(tensor)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.clone()
    whole.untyped_storage().resize_(0)
    return whole


def freed_with_an_offset(tensor: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([tensor, tensor])
    part = whole[len(tensor) :]
    whole.untyped_storage().resize_(0)
    return part


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    """One byte of the last element is missing."""
    whole = tensor.clone()
    whole.untyped_storage().resize_(whole.nbytes - 1)
    return whole


def shrunk_with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(2 * len(tensor), *tensor.shape[1:], dtype=tensor.dtype)
    part = whole[1::2]
    whole.untyped_storage().resize_(whole.nbytes - 1)
    return part


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def sparse(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_sparse()


def with_history(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_() * 1
