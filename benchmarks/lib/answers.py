"""How far an answer is from the one that it should be.

Promises infinity, never NaN, for what is not finite or has another shape. Knows nothing of who
computed it.
"""

from __future__ import annotations

import math

import torch

LOGIT_TOLERANCE = 0.05
"""Largest `relative_error` of the logits after eight layers of bfloat16."""


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference||; 0 where both are zero.

    Infinite where either is not finite everywhere, where shapes differ, and where only the
    reference is zero.
    """
    out, reference = out.float(), reference.float()
    if out.shape != reference.shape or not bool(torch.isfinite(out).all()):
        return float("inf")
    off = float(torch.linalg.vector_norm(out - reference))
    size = float(torch.linalg.vector_norm(reference))
    if off == 0.0:
        return 0.0
    return off / size if size > 0.0 and math.isfinite(off) and math.isfinite(size) else math.inf


def largest_error(*errors: float) -> float:
    """Of several checks of one system; infinite where one is NaN, which `max` may drop."""
    return math.inf if any(map(math.isnan, errors)) else max(errors)
