"""The injection policy: a transformers model gets the growing cache and the BMC attention.

It has the form of DeepSpeed's generic policies (match, apply, match_replaced), which act on a whole
model. It replaces no layer: the attention of a transformers model is chosen by name, so every layer
stays what DeepSpeed made it, be it whole, split by AutoTP or named in a user's `injection_policy`.
Knows nothing of DeepSpeed's engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.module_inject import DSPolicy
from transformers import GenerationMixin, PreTrainedModel

import bmc_transformers
from bmc_deepspeed.config import BMCPolicyConfig


class BMCInjectionPolicy(DSPolicy):
    """What ``kv_policy="bmc"`` does to a model.

    Args:
        config: its settings; None takes the defaults.
    """

    config_class = BMCPolicyConfig

    def __init__(self, config: BMCPolicyConfig | None = None) -> None:
        super().__init__()
        self.config = BMCPolicyConfig() if config is None else config

    def match(self, module: Any) -> bool:
        """Whether ``module`` is a decoder-only transformers model that generates."""
        return (
            isinstance(module, PreTrainedModel)
            and isinstance(module, GenerationMixin)
            and not module.config.is_encoder_decoder
        )

    def prepare(self, module: Any) -> None:
        """Before DeepSpeed converts and splits the model: an earlier policy is taken back, with its
        packed weights, which DeepSpeed could not read.

        Raises:
            ValueError: ``match`` is false. Nothing was changed.
        """
        if not self.match(module):
            raise ValueError(
                f"kv_policy='bmc' with a model of class {type(module).__name__}: "
                "allowed are decoder-only transformers models that have generate()"
            )
        bmc_transformers.disable(module)

    def apply(self, module: PreTrainedModel) -> PreTrainedModel:
        """Makes every ``generate`` of the model use the growing cache; returns the model.

        Raises:
            ValueError: a model or a setting that it cannot do. The cache stays transformers'.
        """
        settings = self.config
        processes = max(getattr(part, "tp_world_size", 1) for part in module.modules())
        if settings.speculate == "auto" and processes > 1:
            raise ValueError(
                f"kv_policy='bmc': speculate=\"auto\" with a model that is split over {processes} "
                'processes: each would choose by its own clock; allowed: "fixed" and None'
            )
        try:
            return bmc_transformers.enable(
                module,
                settings.policy(),
                attention=settings.attention,
                pack_linears=settings.pack_linears,
                speculate=settings.speculate,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"kv_policy='bmc': {error}") from error

    def match_replaced(self, module: Any) -> bool:
        """Whether the policy was applied to ``module``."""
        return self.match(module) and bmc_transformers.is_enabled(module)

    def attention(self, client_module: torch.nn.Module | None = None) -> None:
        """None: query, key, value and output projections stay where they are."""
        return

    def forward_kwargs(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Keyword arguments of one forward pass: with a growing cache where the model would make
        a cache of its own, unchanged otherwise.

        Args:
            module: the model, to which the policy was applied.
            args, kwargs: what its forward is about to be called with.
        """
        given = dict(kwargs)
        if given.get("past_key_values") is not None or not self.match_replaced(module):
            return given
        named = inspect.signature(module.forward).bind_partial(*args, **given).arguments
        use_cache = named.get("use_cache")
        if use_cache is None:
            use_cache = getattr(module.config, "use_cache", False)
        if not use_cache or named.get("past_key_values") is not None:
            return given
        if "past_key_values" in named and "past_key_values" not in given:
            # None, and given by its position: there is no naming it a second time.
            return given
        cache = bmc_transformers.BMCCache(module.config, self.config.policy())
        return {**given, "past_key_values": cache}
