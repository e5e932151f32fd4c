"""Random models for the step benchmark, as Hugging Face folders that vLLM loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """A Llama of bfloat16 random weights; widths in elements."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int = 5632
    vocabulary: int = 32000

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's K and V in all layers."""
        return self.layers * self.kv_heads * self.head_size * 2 * 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights but the norms'."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return 2 * (self.layers * layer + 2 * self.vocabulary * self.hidden)

    def step_bytes(self, batch: int, rows: int) -> int:
        """What a decode step of `batch` sequences of `rows` rows must read: all weights but the
        embedding's, and K and V."""
        embedding = 2 * self.vocabulary * self.hidden
        return self.weight_bytes - embedding + batch * rows * self.row_bytes


MHA = Shape("mha", layers=8, hidden=2048, heads=32, kv_heads=32, head_size=64)
GQA = Shape("gqa", layers=8, hidden=2048, heads=16, kv_heads=4, head_size=128)


def write_model(shape: Shape, folder: Path, max_rows: int, seed: int) -> None:
    """Writes `config.json` and `model.safetensors` (bfloat16) of a Llama into `folder`."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        weights = torch.empty(rows, columns, dtype=torch.bfloat16)
        return weights.normal_(std=WEIGHT_STD, generator=generator)

    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    tensors = {
        "model.embed_tokens.weight": normal(shape.vocabulary, shape.hidden),
        "lm_head.weight": normal(shape.vocabulary, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        for name, rows, columns in (
            ("self_attn.q_proj", queries, shape.hidden),
            ("self_attn.k_proj", keys, shape.hidden),
            ("self_attn.v_proj", keys, shape.hidden),
            ("self_attn.o_proj", shape.hidden, queries),
            ("mlp.gate_proj", shape.intermediate, shape.hidden),
            ("mlp.up_proj", shape.intermediate, shape.hidden),
            ("mlp.down_proj", shape.hidden, shape.intermediate),
        ):
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": max_rows,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
