"""DeepSpeed's inference config with two more fields: ``kv_policy`` and ``kv_policy_config``.

Promises every other field exactly as DeepSpeed has it; a config without ``kv_policy`` prints and
serializes as DeepSpeed's. Knows the settings of the policy only by their class.
"""

from __future__ import annotations

from typing import Any, Literal

from deepspeed import DeepSpeedInferenceConfig as _DeepSpeedInferenceConfig
from pydantic import model_serializer, model_validator

from bmc_deepspeed.config import BMCPolicyConfig

KV_POLICY = "bmc"
OWN_FIELDS = ("kv_policy", "kv_policy_config")


class DeepSpeedInferenceConfig(_DeepSpeedInferenceConfig):
    """DeepSpeed's inference config with the two fields of a KV policy.

    Attributes:
        kv_policy: None (DeepSpeed as it is) or "bmc".
        kv_policy_config: settings of that policy, see BMCPolicyConfig.
    """

    kv_policy: Literal["bmc"] | None = None
    kv_policy_config: BMCPolicyConfig | None = None

    def __init__(self, strict: bool = False, **data: Any) -> None:
        if not strict:
            # DeepSpeed's own filter, but kv_policy="auto" must not pass as "no policy".
            kept = (*OWN_FIELDS, "replace_method")
            data = {key: value for key, value in data.items() if key in kept or value != "auto"}
        super().__init__(strict=True, **data)

    @model_validator(mode="after")
    def _kv_policy_is_possible(self) -> DeepSpeedInferenceConfig:
        if self.kv_policy is None:
            if self.kv_policy_config is not None:
                raise ValueError(
                    "kv_policy_config is given without kv_policy; allowed: "
                    f"kv_policy={KV_POLICY!r} beside it, or neither"
                )
            return self
        for name, why in (
            ("replace_with_kernel_inject", "DeepSpeed's kernels keep a KV cache of their own"),
            ("enable_cuda_graph", "a captured graph cannot follow a cache that grows"),
        ):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True and kv_policy={self.kv_policy!r} exclude each other: {why}"
                )
        return self

    @model_serializer(mode="wrap")
    def _as_deepspeed_where_unused(self, handler: Any) -> dict[str, Any]:
        found = handler(self)
        if self.kv_policy is None:
            for name in OWN_FIELDS:
                found.pop(name, None)
        return found

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            if self.kv_policy is not None or name not in OWN_FIELDS:
                yield name, value
