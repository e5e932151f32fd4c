"""Tiny random models of each attention kind, saved like any Hugging Face model.

Weights are drawn wide, so that greedy decoding does not collapse into one repeated token.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from tests.support import draft_heads

VOCAB = 512
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}


def _llama(num_kv_heads: int, head_dim: int = 32, **changes: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**BASE, **changes}, num_key_value_heads=num_kv_heads, head_dim=head_dim)
    return LlamaForCausalLM(config)


def _mistral_window() -> torch.nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**BASE, num_key_value_heads=2, sliding_window=48, head_dim=32)
    return MistralForCausalLM(config)


def _gemma2() -> torch.nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **{**BASE, "num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=48,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    )
    return Gemma2ForCausalLM(config)


def _bloom_alibi() -> torch.nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=128, n_layer=2, n_head=4, initializer_range=0.15
    )
    return BloomForCausalLM(config)


def _gpt_oss_sinks() -> torch.nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **BASE,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=48,
    )
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


def _gemma3n_shared_kv() -> torch.nn.Module:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    # Layers 2 and 3 read the rows of layers 0 and 1.
    config = Gemma3nTextConfig(
        **{
            **BASE,
            "num_hidden_layers": 4,
            "intermediate_size": [256] * 4,
            "initializer_range": 0.02,
        },
        num_key_value_heads=2,
        head_dim=32,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        laurel_rank=8,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return Gemma3nForCausalLM(config)


def _llama4_chunked() -> torch.nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    # Three layers of chunked local attention, one of full; no experts.
    config = Llama4TextConfig(
        **{**BASE, "num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size_mlp=256,
        attention_chunk_size=128,
        interleave_moe_layer_step=8,
        no_rope_layer_interval=4,
    )
    return Llama4ForCausalLM(config)


def _lfm2_hybrid() -> torch.nn.Module:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        **{**BASE, "num_hidden_layers": 4},
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"] * 2,
        block_auto_adjust_ff_dim=False,
        # vLLM reads these names.
        block_dim=128,
        block_ff_dim=256,
        block_multiple_of=64,
        block_ffn_dim_multiplier=1.0,
        conv_dim=128,
        conv_dim_out=128,
    )
    return Lfm2ForCausalLM(config)


def _mimo_mtp() -> torch.nn.Module:
    """A target that brings a multi-token prediction layer along."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**BASE, num_key_value_heads=2))
    return draft_heads.WithMTPLayer(model)


BUILDERS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama-gqa": lambda: _llama(2),
    "llama-mha": lambda: _llama(4),
    "llama-draft": lambda: _llama(2, num_hidden_layers=1),
    "llama-head512": lambda: _llama(2, head_dim=512),
    "llama-pard": lambda: _llama(2, num_hidden_layers=1, pard_token=7),
    "llama-eagle": lambda: draft_heads.Eagle(_llama(2, num_hidden_layers=1)),
    "llama-eagle3": lambda: draft_heads.Eagle3(_llama(2, num_hidden_layers=1)),
    "medusa": lambda: draft_heads.Medusa(BASE["hidden_size"], VOCAB),
    "mimo-mtp": _mimo_mtp,
    "mistral-window": _mistral_window,
    "gemma2": _gemma2,
    "bloom-alibi": _bloom_alibi,
    "gpt-oss-sinks": _gpt_oss_sinks,
    "gemma3n-shared-kv": _gemma3n_shared_kv,
    "llama4-chunked": _llama4_chunked,
    "lfm2-hybrid": _lfm2_hybrid,
}


class ModelStore:
    """Makes each model once per test session."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str) -> str:
        path = self.root / name
        if not path.exists():
            torch.manual_seed(0)
            BUILDERS[name]().to(torch.float32).save_pretrained(path)
        return str(path)
