"""One random Llama: its shape, its bytes and products, as a module and as a Hugging Face folder.

Promises the same weights in both forms and in every process, and rows of K and V that are the
same for every engine that is filled with them. Knows nothing of engines and clocks.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WEIGHT_STD = 0.02
TABLE_ROWS = 16384
"""Distinct rows of drawn keys and values."""


@dataclass(frozen=True)
class LlamaShape:
    """A Llama; widths in elements, `dtype` of weights, K and V by torch's name."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int = 5632
    vocabulary: int = 32000
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's K and V in all layers."""
        return self.layers * self.kv_heads * self.head_size * 2 * self.torch_dtype.itemsize

    @property
    def num_weights(self) -> int:
        """All but the norms', embedding and output layer included."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + 2 * self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights but the norms'."""
        return self.num_weights * self.torch_dtype.itemsize

    @property
    def _step_weights(self) -> int:
        """Those that a step multiplies with: all but the embedding's."""
        return self.num_weights - self.vocabulary * self.hidden

    def step_bytes(self, batch: int, rows: int) -> int:
        """What a decode step of `batch` sequences of `rows` rows must read: all weights but the
        embedding's, and K and V."""
        return self._step_weights * self.torch_dtype.itemsize + batch * rows * self.row_bytes

    def step_flops(self, batch: int, rows: int) -> int:
        """Multiplications and additions of that step: linear layers and attention."""
        attention = 4 * self.layers * self.heads * self.head_size * rows
        return batch * (2 * self._step_weights + attention)

    def config(self, max_rows: int) -> dict[str, Any]:
        """For `LlamaConfig` and config.json; no token ends a text."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": max_rows,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


MHA = LlamaShape("mha", layers=8, hidden=2048, heads=32, kv_heads=32, head_size=64)
GQA = LlamaShape("gqa", layers=8, hidden=2048, heads=16, kv_heads=4, head_size=128)
TINY = LlamaShape("tiny", 2, 128, 4, 2, 32, intermediate=256, vocabulary=512)


class RandomLlama:
    """A shape with weights.

    Args:
        shape: of the model.
        max_rows: longest sequence that it is told to expect.
        seed: of the weights.
    """

    def __init__(self, shape: LlamaShape, max_rows: int, seed: int = 0) -> None:
        self.shape = shape
        self.max_rows = max_rows
        self.seed = seed
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under the name that transformers has for it, drawn anew in each call."""
        shape = self.shape
        generator = torch.Generator().manual_seed(self.seed)

        def normal(rows: int, columns: int) -> torch.Tensor:
            weights = torch.empty(rows, columns, dtype=shape.torch_dtype)
            return weights.normal_(std=WEIGHT_STD, generator=generator)

        queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        yield "model.embed_tokens.weight", normal(shape.vocabulary, shape.hidden)
        yield "lm_head.weight", normal(shape.vocabulary, shape.hidden)
        yield "model.norm.weight", torch.ones(shape.hidden, dtype=shape.torch_dtype)
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}{name}.weight", torch.ones(shape.hidden, dtype=shape.torch_dtype)
            for name, rows, columns in (
                ("self_attn.q_proj", queries, shape.hidden),
                ("self_attn.k_proj", keys, shape.hidden),
                ("self_attn.v_proj", keys, shape.hidden),
                ("self_attn.o_proj", shape.hidden, queries),
                ("mlp.gate_proj", shape.intermediate, shape.hidden),
                ("mlp.up_proj", shape.intermediate, shape.hidden),
                ("mlp.down_proj", shape.hidden, shape.intermediate),
            ):
                yield f"{prefix}{name}.weight", normal(rows, columns)

    @cached_property
    def module(self) -> LlamaForCausalLM:
        """In evaluation mode; the same object in every call."""
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.initialization import no_init_weights

        before = torch.get_default_dtype()
        torch.set_default_dtype(self.shape.torch_dtype)
        try:
            with no_init_weights():  # drawn below, and not twice
                config = self.shape.config(self.max_rows)
                model = LlamaForCausalLM(LlamaConfig(**config, dtype=self.shape.torch_dtype))
        finally:
            torch.set_default_dtype(before)
        state = model.state_dict()
        for name, weight in self.weights():
            state.pop(name).copy_(weight)
        if state:
            raise RuntimeError(f"transformers' Llama has weights of its own: {list(state)}")
        return model.eval()

    def folder(self) -> Path:
        """`config.json` and `model.safetensors`, written at the first call."""
        if self._folder is None:
            from safetensors.torch import save_file

            self._folder = tempfile.TemporaryDirectory(prefix="bmc-benchmarks-")
            path = Path(self._folder.name)
            config = {
                **self.shape.config(self.max_rows),
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "torch_dtype": self.shape.dtype,
            }
            (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            tensors = dict(self.weights())
            save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
        return Path(self._folder.name)

    def close(self) -> None:
        """Removes the folder; may be called twice."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def drawn_tokens(vocabulary: int, batch: int, rows: int) -> torch.Tensor:
    """int64 `[batch, rows]`, the same in every process; the first three ids are left to others."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (batch, rows), generator=generator)


class DrawnRows:
    """K and V that no model computed, the same in every process: what a cache is filled with in
    seconds, where running the prompts would take minutes."""

    def __init__(self, kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (TABLE_ROWS, kv_heads, head_size)
        self._tables = [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]

    def rows(
        self, layer: int, positions: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of a layer, `[rows, KV heads, head size]`, for positions and token ids
        `[rows]`."""
        rows = (positions * 7919 + tokens * 31 + layer * 104729) % TABLE_ROWS
        key, value = (table.index_select(0, rows) for table in self._tables)
        return key, value
