"""Greedy float32 output is token for token that of transformers' own cache and attention."""

from __future__ import annotations

import pytest
import torch

from bmc_transformers import BMCCache, disable, enable
from tests.support.architectures import (
    CONFIGS,
    SCENARIOS,
    WITHOUT_INTERFACE,
    build,
    expected,
    generated,
)

CASES = [
    (name, attention)
    for name in CONFIGS
    for attention in ("bmc", "stock")
    if not (attention == "bmc" and name in WITHOUT_INTERFACE)
]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_tokens_are_the_stock_ones(name: str, attention: str, scenario: str) -> None:
    model = build(name)
    arguments = SCENARIOS[scenario](model)
    enable(model, 16, attention=attention)
    output = generated(model, arguments)
    cache = output.past_key_values
    assert isinstance(cache, BMCCache)
    layouts = cache.stats().layouts
    assert layouts == {"packed" if attention == "bmc" else "rows": len(cache.layers)}
    assert torch.equal(output.sequences, expected(name, scenario))
    disable(model)
