"""Tiny decoders with random weights, one per way in which attention differs.

Weights are drawn wide, so that greedy decoding does not collapse into one repeated token. Sizes
divide by two in steps of 64, so that DeepSpeed can split the models over two processes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 512
WINDOW = 8

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
_GPT_LIKE: dict[str, Any] = {
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.15,
}

# These repeat their input for ever where random weights are tied.
UNTIED = {"tie_word_embeddings": False}

# name: (config class, its arguments)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("LlamaConfig", _LLAMA_LIKE),
    "llama-mha": ("LlamaConfig", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 128,
            "init_std": 0.15,
        },
    ),
    "gpt2": ("GPT2Config", _GPT_LIKE),
    "gpt-neox": (
        "GPTNeoXConfig",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
        },
    ),
    "mistral-window": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": WINDOW}),
    "gemma2-window": (
        "Gemma2Config",
        {
            **_LLAMA_LIKE,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 4,
            **UNTIED,
        },
    ),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 32}),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "mixtral": (
        "MixtralConfig",
        {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.15, **UNTIED},
    ),
    "gptj": ("GPTJConfig", {**_GPT_LIKE, "rotary_dim": 16}),
}


def make(name: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """The model of that name, float32, the same weights for the same seed."""
    class_name, arguments = CONFIGS[name]
    # No token ends a sequence: every run has the same length.
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    arguments = {"vocab_size": VOCAB, **tokens, **arguments, **changes}
    config = getattr(transformers, class_name)(**arguments)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def prompts(batch: int, rows: int, seed: int = 1) -> torch.Tensor:
    """Token ids ``[batch, rows]``, none of them the padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, rows), generator=generator)


def left_padded(rows: tuple[int, ...], seed: int = 2) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of sequences of these lengths, padded at the left."""
    width = max(rows)
    ids = prompts(len(rows), width, seed)
    mask = torch.ones_like(ids)
    for sequence, length in enumerate(rows):
        ids[sequence, : width - length] = 0
        mask[sequence, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}
