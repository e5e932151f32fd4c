"""How far an answer is from the one that it should be.

Promises infinity, never NaN, for what is not finite or has another shape. Knows nothing of who
computed it.
"""

from __future__ import annotations

import torch

LOGIT_TOLERANCE = 0.05
"""Largest `relative_error` of the logits after eight layers of bfloat16."""


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference||; infinite where `out` is not finite everywhere."""
    out = out.float()
    if out.shape != reference.shape or not bool(torch.isfinite(out).all()):
        return float("inf")
    return float(torch.linalg.vector_norm(out - reference) / torch.linalg.vector_norm(reference))
