"""Tiny models with random weights, one per architecture, and ways to generate with them.

Weights are large enough that attention is not flat, and the same for the same name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCABULARY = 96
WINDOW = 24
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # tied, a random model repeats its input
}
DECODER: dict[str, Any] = COMMON | {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**DECODER),
    "llama-mha": lambda: LlamaConfig(**DECODER | {"num_key_value_heads": 4}),
    "opt": lambda: OPTConfig(
        **COMMON,
        hidden_size=128,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=128,
    ),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=128, n_layer=2, n_head=4, n_positions=512),
    "gpt-neox": lambda: GPTNeoXConfig(
        **{k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
    ),
    "mistral": lambda: MistralConfig(**DECODER, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **DECODER,
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",  # "sdpa" ignores the soft cap
    ),
    "qwen3": lambda: Qwen3Config(**DECODER),
    "phi3": lambda: Phi3Config(**{k: v for k, v in DECODER.items() if k != "head_dim"}),
    "mixtral": lambda: MixtralConfig(**DECODER, num_local_experts=2, num_experts_per_tok=2),
    "gpt-oss": lambda: GptOssConfig(
        **DECODER,
        sliding_window=WINDOW,
        num_local_experts=2,
        num_experts_per_tok=2,
        attn_implementation="eager",  # it has no "sdpa": attention sinks
    ),
    "bloom": lambda: BloomConfig(**COMMON, hidden_size=128, n_layer=2, n_head=4),
    "gptj": lambda: GPTJConfig(
        **COMMON, n_embd=128, n_layer=2, n_head=4, n_positions=512, rotary_dim=16
    ),
}
WITHOUT_INTERFACE = ("bloom", "gptj")


@cache
def _built(name: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.4 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of its own, equal for equal arguments."""
    return copy.deepcopy(_built(name, dtype))


def draft(model: PreTrainedModel) -> PreTrainedModel:
    """A model that often, but not always, agrees with this one."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(noise * parameter.std() * 0.05 if parameter.numel() > 1 else 0)
    return twin


def prompt(batch: int = 2, rows: int = 21) -> torch.Tensor:
    """Token ids `[batch, rows]` that repeat themselves, so that prompt lookup finds something."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, VOCABULARY, (batch, rows), generator=generator)
    ids[:, 9:16] = ids[:, :7]
    return ids


def padding(batch: int = 2, rows: int = 21) -> torch.Tensor:
    """An attention mask with left padding of different lengths."""
    mask = torch.ones(batch, rows, dtype=torch.int64)
    mask[0, :6] = 0
    return mask


SCENARIOS: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "plain": lambda model: {"inputs": prompt()},
    "padded": lambda model: {"inputs": prompt(), "attention_mask": padding()},
    "beams": lambda model: {"inputs": prompt(1), "num_beams": 3},
    "assisted": lambda model: {"inputs": prompt(1), "assistant_model": draft(model)},
    "lookup": lambda model: {"inputs": prompt(1), "prompt_lookup_num_tokens": 4},
    "chunked": lambda model: {"inputs": prompt(), "prefill_chunk_size": 8},
}


def generated(model: PreTrainedModel, arguments: dict[str, Any], tokens: int = 40) -> Any:
    """What greedy (or beam) search gives; the cache is in `past_key_values`."""
    return model.generate(
        **arguments, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True
    )


@cache
def expected(name: str, scenario: str) -> torch.Tensor:
    """The tokens of the stock framework, float32."""
    model = build(name)
    return generated(model, SCENARIOS[scenario](model)).sequences
