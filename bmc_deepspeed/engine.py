"""DeepSpeed's inference engine with the KV policy of its config.

Promises DeepSpeed's engine, method for method, where the config names no KV policy. Knows nothing
of caches: that is the policy's.
"""

from __future__ import annotations

from typing import Any

from deepspeed import InferenceEngine as _InferenceEngine
from deepspeed.utils import log_dist

from bmc_deepspeed.injection_policy import BMCInjectionPolicy


class InferenceEngine(_InferenceEngine):
    """What ``deepspeed.init_inference`` returns."""

    module: Any
    kv_policy: BMCInjectionPolicy | None = None
    """The applied policy; None: DeepSpeed's engine as it is."""

    def __init__(self, model: Any, config: Any) -> None:
        # A config of DeepSpeed's own class, made before ours took its place, has no such field.
        if getattr(config, "kv_policy", None) is None:
            super().__init__(model, config)
            return
        policy = BMCInjectionPolicy(config.kv_policy_config)
        policy.prepare(model)
        super().__init__(model, config)
        # After DeepSpeed's own injection: dtype, split and device of the weights are settled.
        self.module = policy.apply(self.module)
        self.kv_policy = policy
        log_dist(f"kv_policy={config.kv_policy}: {policy.config!r}", ranks=[0])

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """One forward pass; a cache that the model would make is made by the KV policy."""
        if self.kv_policy is not None:
            kwargs = self.kv_policy.forward_kwargs(self.module, inputs, kwargs)
        return super().forward(*inputs, **kwargs)
