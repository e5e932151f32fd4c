"""Which attention a model and its parts are set to, and how to set the decoder's alone.

transformers keeps the choice in every config of a model; `config._attn_implementation` reads it.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

Implementations = list[tuple[Any, Any]]
"""Configs and the attention implementation of each."""


def for_decoder(model: PreTrainedModel, name: str) -> str | dict[str, str]:
    """An attention implementation for the decoder of a model that may have other parts."""
    decoder = model.config.get_text_config(decoder=True)
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is decoder:
            return {"": model.config._attn_implementation, key: name}
    return name


def implementations(model: PreTrainedModel) -> Implementations:
    """Every config of the model and its parts, once, and its attention implementation."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    for key in model.config.sub_configs:
        config = getattr(model.config, key, None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return [(config, config._attn_implementation_internal) for config in found.values()]


def restore(previous: Implementations, *, instead_of: str) -> None:
    """Sets those configs back that still have the implementation `instead_of`: what the user has
    chosen since then stays."""
    for config, implementation in previous:
        if config._attn_implementation == instead_of:
            config._attn_implementation_internal = implementation
