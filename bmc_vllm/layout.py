"""Why the KV pool does not have the layout that the kernel reads fastest.

vLLM lays the whole pool out in one way that suits every layer. In ``LHBNC`` a head's rows in
adjacent blocks are one stretch of memory; where one layer cannot take it, no layer gets it.
Knows nothing of what the layout is worth (docs/kernel-log.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm.envs as envs
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import KVCacheLayout

from bmc_vllm.attention import BMCAttentionBackend

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BEST = KVCacheLayout.LHBNC


def lost_layout(vllm_config: VllmConfig) -> str | None:
    """One sentence on which layer or setting costs the BMC layers their layout, once the pool's
    layout is decided; None if they have it, or if there are none."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]
    if BMCAttentionBackend not in [layer.get_attn_backend() for layer in layers.values()]:
        return None
    layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
    if layout is BEST:
        return None
    reason = _unable(layers) or _setting() or _shapes(layers, vllm_config)
    return f"{reason}: the KV pool's layout is {layout.name}, which reads slower than {BEST.name}"


def _unable(layers: dict[str, AttentionLayerBase]) -> str | None:
    unable = []
    for name, layer in layers.items():
        taken = layer.get_attn_backend().supported_kv_cache_layouts()
        if taken is not None and BEST not in taken:
            unable.append(name)
    if not unable:
        return None
    more = f" and {len(unable) - 1} more" if len(unable) > 1 else ""
    backend = layers[unable[0]].get_attn_backend().get_name()
    return f"layer {unable[0]}{more} on {backend}"


def _setting() -> str | None:
    asked = envs.VLLM_KV_CACHE_LAYOUT
    return None if asked is None else f"VLLM_KV_CACHE_LAYOUT={asked}"


def _shapes(layers: dict[str, AttentionLayerBase], vllm_config: VllmConfig) -> str:
    """vLLM lays a head of all blocks side by side only where all layers' heads are alike."""
    first: dict[tuple[int, ...], str] = {}
    for name, layer in layers.items():
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is not None and spec.has_layer_views:
            first.setdefault((spec.num_heads, spec.num_states, spec.page_size_bytes), name)
    return f"layers {' and '.join(first.values())} differ in the shape of their blocks"
