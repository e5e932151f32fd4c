"""The systems of the generate benchmark: one Hugging Face model, several caches over its weights.

Promises that all systems compute with the same weight tensors (a packed copy where linears are
packed), and that each fills its cache with the same rows. Knows nothing of timing.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.lib.llama import Shape
from bmc_transformers import BMCCache, enable
from bmc_transformers.stats import CacheStats


def build_model(shape: Shape, max_rows: int, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    """A Llama of random weights, without tokens that end a text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max_rows,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=dtype,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model object over the same weight tensors."""
    shared = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return copy.deepcopy(model, shared)


class GenerateSystem(ABC):
    """One way to generate.

    Attributes:
        name, title: in rows, in tables.
        peer: whether it is what BMC is compared with.
        reference: name of the system whose logits it must have.
    """

    name: str
    title: str
    peer = False
    reference = "dynamic"
    model: Any
    cache: Cache | None = None

    @abstractmethod
    def new_cache(self, max_length: int) -> Cache:
        """An empty cache for sequences of at most that many rows."""

    def fill(self, layer: int, key: torch.Tensor, value: torch.Tensor, steps: int) -> None:
        """Rows `[batch, kv heads, rows, head size]` of one layer into the cache, which is new with
        layer 0 and has room for `steps` more."""
        if layer == 0:
            self.cache = None
            self.cache = self.new_cache(key.shape[2] + steps)
        assert self.cache is not None
        self.cache.update(key, value, layer)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One decode step of tokens `[batch, 1]`; returns the logits `[batch, vocabulary]`."""
        with torch.inference_mode():
            out = self.model(
                input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        return out.logits[:, -1]

    def generate(self, prompts: torch.Tensor, new: int) -> torch.Tensor:
        """Greedy `generate` as a user calls it; returns all tokens `[batch, rows + new]`."""
        return self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            do_sample=False,
            **self.generate_arguments(),
        )

    def generate_arguments(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Ends what runs outside this process."""

    def stats(self) -> CacheStats | None:
        """What the cache counted; None for caches that do not count."""
        return self.cache.stats() if isinstance(self.cache, BMCCache) else None


class Dynamic(GenerateSystem):
    """transformers' default: K and V are concatenated anew for every token."""

    name, title, peer = "dynamic", "DynamicCache", True

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = twin(model)

    def new_cache(self, max_length: int) -> Cache:
        return DynamicCache(config=self.model.config)


class Static(Dynamic):
    """transformers' cache of fixed size, not compiled: attention goes over all of it, masked."""

    name, title = "static", "StaticCache"

    def new_cache(self, max_length: int) -> Cache:
        return StaticCache(config=self.model.config, max_cache_len=max_length)

    def generate_arguments(self) -> dict[str, Any]:
        return {"cache_implementation": "static", "disable_compile": True}


class DeepSpeed(Dynamic):
    """`deepspeed.init_inference` as it is: the same cache behind DeepSpeed's engine.

    It has no reference but itself: DeepSpeed rounds the rotary frequencies to the model's dtype, so
    that its bfloat16 logits are others than transformers' after some hundred rows.

    Raises:
        ImportError: DeepSpeed is not installed.
    """

    name, title, reference = "deepspeed", "DeepSpeed", "deepspeed"

    def __init__(self, model: LlamaForCausalLM, **policy: Any) -> None:
        import deepspeed

        import bmc_deepspeed  # noqa: F401 - makes kv_policy known

        self.model = deepspeed.init_inference(twin(model), dtype=model.dtype, **policy)

    def new_cache(self, max_length: int) -> Cache:
        return DynamicCache(config=self.model.module.config)


class BMC(GenerateSystem):
    """`bmc_transformers.enable`: the growing cache, and the native kernel or the model's own
    attention over views of the valid rows."""

    name, title = "bmc", "BMC"

    def __init__(
        self,
        model: LlamaForCausalLM,
        r: int,
        *,
        attention: Literal["bmc", "stock"] = "bmc",
        pack: bool = False,
    ) -> None:
        self.r = r
        # Packing takes the plain weights away, so it needs its own.
        own = copy.deepcopy(model) if pack else twin(model)
        self.model = enable(own, r, attention=attention, pack_linears=pack)
        if attention == "stock":
            self.name, self.title = "bmc_views", "BMC, torch attention"
        if pack:
            self.name, self.title = "bmc_packed", "BMC, packed linears"

    def new_cache(self, max_length: int) -> Cache:
        return BMCCache(self.model.config, self.r)


class BMCDeepSpeed(DeepSpeed):
    """`deepspeed.init_inference(..., kv_policy="bmc")`."""

    name, title, peer = "bmc_deepspeed", "BMC in DeepSpeed", False

    def __init__(self, model: LlamaForCausalLM, r: int) -> None:
        super().__init__(model, kv_policy="bmc", kv_policy_config={"r": r})
        self.r = r

    def new_cache(self, max_length: int) -> Cache:
        return BMCCache(self.model.module.config, self.r)


NAMES = (
    "dynamic", "static", "deepspeed", "bmc", "bmc_views", "bmc_packed", "bmc_deepspeed",
)  # fmt: skip


def make(name: str, model: LlamaForCausalLM, r: int) -> GenerateSystem:
    """The system of that name over the model's weights.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    match name:
        case "dynamic":
            return Dynamic(model)
        case "static":
            return Static(model)
        case "deepspeed":
            return DeepSpeed(model)
        case "bmc":
            return BMC(model, r)
        case "bmc_views":
            return BMC(model, r, attention="stock")
        case "bmc_packed":
            return BMC(model, r, pack=True)
        case "bmc_deepspeed":
            return BMCDeepSpeed(model, r)
    raise ValueError(f"system {name!r}; allowed: {', '.join(NAMES)}")
