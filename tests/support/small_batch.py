"""A small batch and one call of the operator on it, for tests that change an argument."""

from __future__ import annotations

import torch

from bmc_core.attention import paged_attention
from tests.support.reference import Case, Inputs


def small_inputs() -> Inputs:
    return Inputs(Case(seq_lens=[40, 20], query_lens=[1, 2], poison=0.0))


def attend(inputs: Inputs, **changes) -> None:
    arguments = {
        "query": inputs.query,
        "kv_cache": inputs.kv_cache,
        "batch": inputs.batch(),
        "out": torch.empty_like(inputs.query),
        "scale": 1.0,
    }
    paged_attention(**{**arguments, **changes})
