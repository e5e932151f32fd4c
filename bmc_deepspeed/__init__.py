"""DeepSpeed's inference engine with a KV cache that grows ``r`` rows at a time.

Importing this package makes ``deepspeed.init_inference`` take ``kv_policy="bmc"`` and
``kv_policy_config={...}``, by keyword, dict or JSON file. Without ``kv_policy`` DeepSpeed does what
it did before.
"""

from bmc_deepspeed.hooks import install

install()

from bmc_deepspeed.config import BMCPolicyConfig  # noqa: E402
from bmc_deepspeed.injection_policy import BMCInjectionPolicy  # noqa: E402

__all__ = ["BMCInjectionPolicy", "BMCPolicyConfig"]
