"""Random models for the step benchmark, as Hugging Face folders that vLLM loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.step_cases import Shape

WEIGHT_STD = 0.02


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
