"""Configs, rows and filled caches of two layers: one with a window, one without."""

from __future__ import annotations

import torch
from transformers import Gemma2Config

from bmc_transformers import BMCCache, register_attention

HEADS, SIZE, WINDOW = 2, 32, 9


def config(layout: str = "packed", window: int = WINDOW) -> Gemma2Config:
    """A layer with a window, then one without."""
    register_attention()
    made = Gemma2Config(
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=SIZE,
        sliding_window=window,
        max_position_embeddings=256,
    )
    made._attn_implementation = "bmc" if layout == "packed" else "sdpa"
    return made


def rows(batch: int, count: int) -> torch.Tensor:
    return torch.randn(batch, HEADS, count, SIZE)


def filled(layout: str, count: int = 30, batch: int = 2, r: int = 16, window: int = WINDOW):
    cache = BMCCache(config(layout, window), r)
    for layer in range(2):
        cache.update(rows(batch, count), rows(batch, count), layer)
    return cache


def contents(cache: BMCCache) -> list[torch.Tensor]:
    return [t.clone() for layer in cache.layers for t in (layer.keys, layer.values)]
