"""Pairs of models whose drafts are right as often as a test wants."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def pair(
    epsilon: float,
    *,
    layers: int = 4,
    draft_layers: int = 1,
    hidden: int = 64,
    vocabulary: int = 96,
    seed: int = 0,
) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A target, and a draft model made of its first layers, in float32.

    What the target's later layers add to the residual stream is scaled by `epsilon`: 0 makes both
    models say the same, and acceptance falls as it grows. Embeddings and head are untied and drawn
    wide, so that logits have no ties and the text does not repeat one token.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    target = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.4 / parameter.shape[-1] ** 0.5)
        for layer in target.model.layers[draft_layers:]:
            layer.self_attn.o_proj.weight.mul_(epsilon)
            layer.mlp.down_proj.weight.mul_(epsilon)
    draft = copy.deepcopy(target)
    del draft.model.layers[draft_layers:]
    draft.config.num_hidden_layers = draft_layers
    return target, draft


def always_wrong(model: PreTrainedModel) -> PreTrainedModel:
    """A draft model whose every token is another than the model's: its head is turned round."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    return twin
