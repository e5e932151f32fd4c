"""The settings of kv_policy="bmc" as a growth policy."""

from __future__ import annotations

from typing import Any

import pytest

from bmc_core.policy import BMCPolicy
from bmc_deepspeed import BMCPolicyConfig


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, "auto"),
        ({"r": "auto"}, "auto"),
        ({"r": 32}, repr(BMCPolicy(r=32))),
        ({"T": 5}, repr(BMCPolicy(T=5))),
    ],
)
def test_policy_of_settings(settings: dict[str, Any], policy: str) -> None:
    found = BMCPolicyConfig(**settings).policy()
    assert (found if isinstance(found, str) else repr(found)) == policy
