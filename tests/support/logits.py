"""Logits of a model, and how close those of BMC and stock attention are."""

from __future__ import annotations

import torch

# Largest difference of logits allowed between BMC and stock attention, relative to the largest
# logit. Both round in every layer; the kernel also rounds the probabilities to bfloat16.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def logits(model, ids, cache=None, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **arguments).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert not actual.isnan().any()
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= TOLERANCE[expected.dtype]
