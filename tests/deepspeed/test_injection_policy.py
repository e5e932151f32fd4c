"""The injection policy by itself, without an engine."""

from __future__ import annotations

from deepspeed.module_inject import DSPolicy

import bmc_transformers
from bmc_deepspeed import BMCInjectionPolicy, BMCPolicyConfig
from tests.support import tiny_decoders


def test_injection_policy_has_deepspeeds_form() -> None:
    model = tiny_decoders.make("llama-gqa")
    policy = BMCInjectionPolicy(BMCPolicyConfig(r=16))
    assert isinstance(policy, DSPolicy)
    assert policy.match(model)
    assert not policy.match(model.model)
    assert not policy.match_replaced(model)
    policy.prepare(model)
    assert policy.apply(model) is model
    assert policy.match_replaced(model)
    assert policy.attention(model) is None
    assert bmc_transformers.is_enabled(model)
    bmc_transformers.disable(model)
    assert not policy.match_replaced(model)
