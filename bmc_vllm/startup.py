"""What the engine says at its start: which layers run on BMC, and which KV caches grow by chunks.

Promises to tell what was built, layer by layer and group by group, not what was asked for. Knows
nothing of why BMC lacks a feature: the platform noted that when it chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import (
    KVCacheGroupSpec,
    KVCacheSpec,
    UniformTypeKVCacheSpecs,
    get_kv_cache_spec_kind,
)

from bmc_vllm.config import AUTO
from bmc_vllm.kv_cache_interface import is_bmc_spec
from bmc_vllm.platform import BACKEND_NAME, FALLBACKS


def attention_layers(layers: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The attention layers of vLLM's ``static_forward_context`` by the name of their backend."""
    found: dict[str, list[Any]] = {}
    for layer in layers.values():
        # Layers of other kinds (Mamba, mixtures of experts) are registered there as well.
        if hasattr(layer, "attn_backend"):
            found.setdefault(layer.attn_backend.get_name(), []).append(layer)
    return found


def layers_in_words(found: Mapping[str, list[Any]]) -> str:
    """How many layers run on which backend, BMC first, and why the others do not run on it.

    Args:
        found: as `attention_layers` gives them.
    """
    total = sum(map(len, found.values()))
    ours = len(found.get(BACKEND_NAME, ()))
    words = [f"attention backend BMC for {ours} of {total} layers"]
    for name, layers in found.items():
        if name != BACKEND_NAME:
            reasons = sorted({reason for layer in layers for reason in _lacking(layer)})
            why = f"BMC lacks {'; '.join(reasons)}" if reasons else "as selected"
            words.append(f"{name} for {len(layers)} ({why})")
    return ", ".join(words)


def _lacking(layer: Any) -> list[str]:
    """What BMC lacked when a layer like this one asked for it; nothing if none did."""
    has_sliding_window = getattr(layer, "sliding_window", None) is not None
    return [
        feature
        for asked, feature in FALLBACKS.items()
        if asked.has_sliding_window == has_sliding_window
        and all(getattr(layer, name, asked_for) == asked_for for name, asked_for in _known(asked))
    ]


def _known(asked: AttentionSelectorConfig) -> list[tuple[str, Any]]:
    """What vLLM's layers remember of what they asked for."""
    names = ("head_size", "attn_type", "kv_cache_dtype", "has_sink", "use_mm_prefix")
    return [(name, getattr(asked, name)) for name in names]


def groups_in_words(groups: Iterable[KVCacheGroupSpec], rows: int | Literal["auto"] | None) -> str:
    """How many KV cache groups grow by ``rows``, and which grow as in stock vLLM.

    Args:
        rows: r; "auto" where the scheduler has yet to measure it; None where the scheduler is not
            BMC's, so that nothing grows by r rows.
    """
    specs = [_one_of(group.kv_cache_spec) for group in groups]
    if not specs:
        return "no KV cache"
    growing = sum(rows is not None and is_bmc_spec(spec) for spec in specs)
    words = [f"{growing} of {len(specs)} KV cache groups in chunks"]
    if growing:
        words[0] += ' (r="auto": measured next)' if rows == AUTO else f" of r={rows} rows"
    others = Counter(
        get_kv_cache_spec_kind(spec).value.replace("_", " ")
        for spec in specs
        if rows is None or not is_bmc_spec(spec)
    )
    words += [f"{number} block by block ({name})" for name, number in others.items()]
    return ", ".join(words)


def _one_of(spec: KVCacheSpec) -> KVCacheSpec:
    """A layer's spec: the scheduler picks any one of a group's too, they share a manager."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return next(iter(spec.kv_cache_specs.values()))
    return spec
