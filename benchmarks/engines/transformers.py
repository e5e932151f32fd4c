"""Hugging Face generation: one module's weights under transformers' caches and under BMC's.

Promises that all engines over one `RandomLlama` compute with the same weight tensors (a packed
copy where linears are packed). Knows nothing of other frameworks.
"""

from __future__ import annotations

import copy
import functools
import time
from abc import abstractmethod
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from benchmarks.engines.base import Batch, Counted, Engine, Step
from benchmarks.lib.llama import DrawnRows, LlamaShape, RandomLlama, drawn_tokens
from bmc_transformers import BMCCache, enable

drawn_rows = functools.lru_cache(1)(DrawnRows)
"""The same tables for every fill: drawing them takes longer than filling a small cache."""


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model object over the same weight tensors."""
    shared = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return copy.deepcopy(model, shared)


class HuggingFace(Engine):
    """A model that is called with a cache, in this process and on torch's threads."""

    reference = "dynamic"
    model: Any = None
    cache: Cache | None = None

    def start(self, model: RandomLlama, largest: Batch) -> None:
        self.shape = model.shape
        self.model = self.load(model.module)
        self.threads = torch.get_num_threads()

    @abstractmethod
    def load(self, model: LlamaForCausalLM) -> Any:
        """What is called instead of the model; the model itself is left as it is."""

    @abstractmethod
    def new_cache(self, max_rows: int) -> Cache:
        """An empty cache for sequences of at most that many rows."""

    @property
    def config(self) -> Any:
        return self.model.config

    def fill(self, batch: Batch) -> None:
        self.empty()
        self.batch = batch
        shape, (sequences, rows, new_rows) = self.shape, batch
        cache = self.cache = self.new_cache(rows + new_rows)
        drawn = drawn_rows(shape.kv_heads, shape.head_size, shape.torch_dtype)
        tokens = drawn_tokens(shape.vocabulary, sequences, rows + 1)
        positions = torch.arange(rows).repeat(sequences)
        size = (sequences, rows, shape.kv_heads, shape.head_size)
        for layer in range(shape.layers):
            both = drawn.rows(layer, positions, tokens[:, :rows].flatten())
            # [sequences, rows, KV heads, D] -> [sequences, KV heads, rows, D]
            key, value = (x.view(size).transpose(1, 2).contiguous() for x in both)
            cache.update(key, value, layer)
        self.next = tokens[:, rows:]
        self.found: list[torch.Tensor] = []

    def _step(self) -> torch.Tensor:
        """Logits `[sequences, 1, vocabulary]` of the next token, which is then known."""
        with torch.inference_mode():
            out = self.model(
                input_ids=self.next, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
            self.next = out.logits.argmax(-1)
        self.found.append(self.next)
        return out.logits

    def step(self, count: int) -> list[Step]:
        steps = []
        for _ in range(count):
            before = self._growths()
            start = time.perf_counter()
            self._step()
            seconds = time.perf_counter() - start
            steps.append(Step(seconds, self._growths() != before))
        return steps

    def logits(self) -> torch.Tensor:
        return self._step()[:, -1].float()

    def replay(self, tokens: torch.Tensor) -> torch.Tensor:
        self.fill(self.batch)
        rows = torch.cat([self.next, tokens], 1)
        with torch.inference_mode():
            out = self.model(
                input_ids=rows, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        return out.logits[:, -1].float()

    def tokens(self) -> list[list[int]]:
        return torch.cat(self.found, 1).tolist()

    def generate(self, prompts: torch.Tensor, new: int) -> torch.Tensor:
        self.empty()
        return self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            do_sample=False,
            **self.generate_arguments(),
        )

    def generate_arguments(self) -> dict[str, Any]:
        return {}

    def counted(self) -> Counted | None:
        if not isinstance(self.cache, BMCCache):
            return None
        stats = self.cache.stats()
        return Counted(stats.growths, stats.bytes_copied, stats.bytes_reserved)

    def _growths(self) -> int:
        counted = self.counted()
        return 0 if counted is None else counted.growths

    def empty(self) -> None:
        self.cache = None

    def close(self) -> None:
        self.cache = self.model = None


class Dynamic(HuggingFace):
    """transformers' default: K and V are concatenated anew for every token."""

    name, title, peer = "dynamic", "DynamicCache", True

    def load(self, model: LlamaForCausalLM) -> Any:
        return twin(model)

    def new_cache(self, max_rows: int) -> Cache:
        return DynamicCache(config=self.config)


class Static(Dynamic):
    """transformers' cache of fixed size, not compiled: attention goes over all of it, masked."""

    name, title = "static", "StaticCache"

    def new_cache(self, max_rows: int) -> Cache:
        return StaticCache(config=self.config, max_cache_len=max_rows)

    def generate_arguments(self) -> dict[str, Any]:
        return {"cache_implementation": "static", "disable_compile": True}


class BMC(HuggingFace):
    """`bmc_transformers.enable`: the growing cache, and the native kernel or the model's own
    attention over views of the valid rows.

    Args:
        r: rows per growth.
    """

    name, title = "bmc", "BMC"
    attention: Literal["bmc", "stock"] = "bmc"
    packs = False

    def __init__(self, r: int) -> None:
        self.r = r

    def load(self, model: LlamaForCausalLM) -> Any:
        # Packing takes the plain weights away, so it needs its own.
        own = copy.deepcopy(model) if self.packs else twin(model)
        return enable(own, self.r, attention=self.attention, pack_linears=self.packs)

    def new_cache(self, max_rows: int) -> Cache:
        return BMCCache(self.config, self.r)

    def fill_bytes(self, shape: LlamaShape, batch: Batch) -> int:
        return super().fill_bytes(shape, batch._replace(new_rows=batch.new_rows + 2 * self.r))


class BMCViews(BMC):
    """The cache alone, under torch's attention."""

    name, title, attention = "bmc_views", "BMC, torch attention", "stock"


class BMCPacked(BMC):
    """Cache, kernel and packed linear layers."""

    name, title, packs = "bmc_packed", "BMC, packed linears", True

    def start_bytes(self, shape: LlamaShape, largest: Batch) -> int:
        """Plain weights of its own, and their packed copy, which takes their place layer by layer;
        the allocator may keep what was freed."""
        return 2 * shape.weight_bytes


def make(name: str, r: int) -> HuggingFace:
    """The engine of that name, not started."""
    if name == "dynamic":
        return Dynamic()
    if name == "static":
        return Static()
    return {"bmc": BMC, "bmc_views": BMCViews, "bmc_packed": BMCPacked}[name](r)
