"""DeepSpeed's inference engine as it is, and with `kv_policy="bmc"`.

It has no reference but itself: DeepSpeed rounds the rotary frequencies to the model's dtype, so
that its bfloat16 logits are others than transformers' after some hundred rows.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from transformers import Cache, DynamicCache, LlamaForCausalLM

import bmc_deepspeed  # noqa: F401 - makes kv_policy known
from benchmarks.engines.base import Batch
from benchmarks.engines.transformers import HuggingFace, twin
from benchmarks.lib.llama import LlamaShape
from bmc_transformers import BMCCache


class DeepSpeed(HuggingFace):
    """`deepspeed.init_inference`: transformers' cache behind DeepSpeed's engine."""

    name, title, peer, reference = "deepspeed", "DeepSpeed", True, "deepspeed"

    def load(self, model: LlamaForCausalLM) -> Any:
        return deepspeed.init_inference(twin(model), dtype=model.dtype)

    @property
    def config(self) -> Any:
        return self.model.module.config

    def new_cache(self, max_rows: int) -> Cache:
        return DynamicCache(config=self.config)


class BMCDeepSpeed(DeepSpeed):
    """`deepspeed.init_inference(..., kv_policy="bmc")`.

    Args:
        r: rows per growth.
    """

    name, title, peer = "bmc_deepspeed", "BMC in DeepSpeed", False

    def __init__(self, r: int) -> None:
        self.r = r

    def load(self, model: LlamaForCausalLM) -> Any:
        return deepspeed.init_inference(
            twin(model), dtype=model.dtype, kv_policy="bmc", kv_policy_config={"r": self.r}
        )

    def new_cache(self, max_rows: int) -> Cache:
        return BMCCache(self.config, self.r)

    def fill_bytes(self, shape: LlamaShape, batch: Batch) -> int:
        return super().fill_bytes(shape, batch._replace(new_rows=batch.new_rows + 2 * self.r))


def make(name: str, r: int) -> DeepSpeed:
    """The engine of that name, not started."""
    return DeepSpeed() if name == "deepspeed" else BMCDeepSpeed(r)
