"""The settings of kv_policy="bmc" as a growth policy."""

from __future__ import annotations

from typing import Any

import pytest

from bmc_core.policy import BMCPolicy
from bmc_deepspeed import BMCPolicyConfig


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, BMCPolicy("auto")),
        ({"r": "auto"}, BMCPolicy("auto")),
        ({"r": 32}, BMCPolicy(r=32)),
        ({"T": 5}, BMCPolicy(T=5)),
    ],
)
def test_policy_of_settings(settings: dict[str, Any], policy: BMCPolicy) -> None:
    assert BMCPolicyConfig(**settings).policy() == policy
