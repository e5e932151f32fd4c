"""Training: stock gradients without a cache, an error through one."""

from __future__ import annotations

import pytest
import torch

from bmc_transformers import BMCCache, enable
from tests.support.architectures import (
    build,
    padding,
    prompt,
)
from tests.support.logits import assert_close, logits


class TestTraining:
    def test_gradients_are_stock_without_a_cache(self) -> None:
        model = build("llama").train()
        gradients = []
        for _ in range(2):
            model.zero_grad()
            model(prompt(), use_cache=False, attention_mask=padding()).logits[
                0, 6:
            ].sum().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
            enable(model, 16)
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("attention", ["bmc", "stock"])
    def test_through_a_cache_they_are_refused(self, attention: str) -> None:
        model = enable(build("llama"), 16, attention=attention)
        cache = BMCCache(model.config, 16)
        output = model(prompt(), past_key_values=cache).logits
        assert output.requires_grad
        assert_close(output.detach(), logits(model, prompt()))
        with pytest.raises(RuntimeError, match="BMC keeps no gradients"):
            output.sum().backward()
