"""Whether a layer runs on BMC: vLLM's question, answered by what the backends declare.

Promises one source of truth, ``validate_configuration`` of the backends, and that it fails closed:
a property of layers that this version of ours has never heard of makes a layer fall back. A
feature that the fallback lacks as well is never sold as one that it has. Knows nothing of how
attention is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.selector import AttentionSelectorConfig

from bmc_vllm.attention import KNOWN_FIELDS, BMCAttentionBackend

_MM_PREFIX = "partial multimodal token full attention not supported"
_BATCH_INVARIANCE = "batch invariance not supported"
_R_SWA = "R-SWA not supported"

WORDS = {
    "head_size not supported": "head size {head_size}",
    "dtype not supported": "dtype {dtype}",
    "kv_cache_dtype not supported": "kv_cache_dtype={kv_cache_dtype!r} with dtype {dtype}",
    "block_size not supported": "block_size={block_size}",
    _MM_PREFIX: "bidirectional attention over multimodal prefixes",
    "MLA not supported": "multi-head latent attention (MLA)",
    "sparse not supported": "sparse attention",
    "per-head quant scales not supported": "per-head quantization scales",
    "attention type {attn_type} not supported": "attention type {attn_type!r}",
    _R_SWA: "reference sliding window attention",
    _BATCH_INVARIANCE: "VLLM_BATCH_INVARIANT",
    "KV connector not supported": "a KV connector (kv_transfer_config)",
    "PCP not supported": "prefill context parallelism",
    "DCP not supported": "decode context parallelism",
    "device-cpu query lens mismatch not supported, this is needed for adaptive verification": (
        "adaptive verification"
    ),
}
"""Our words for vLLM's reasons, with the names of settings; other reasons stay as they are."""

IGNORED = frozenset({_MM_PREFIX, _BATCH_INVARIANCE, _R_SWA})
"""What CPU_ATTN runs without, ignoring it: as long as it does, a layer gains nothing there."""


@dataclass(frozen=True)
class Decision:
    """Where a layer that asked for BMC runs, in words.

    Attributes:
        lacks: features for which it runs on the fallback; empty if it runs on BMC.
        nowhere: features, among them or besides, that the fallback does not implement either.
    """

    lacks: tuple[str, ...]
    nowhere: tuple[str, ...]

    def line(self, fallback: str) -> str | None:
        """What the user should know, where ``fallback`` is the other backend; None if nothing."""
        if not self.lacks:
            if not self.nowhere:
                return None
            return (
                f"neither attention backend BMC nor {fallback} implements "
                f"{_listed(self.nowhere)}: these layers use BMC, without it"
            )
        line = (
            f"attention backend BMC does not support {_listed(self.lacks)}: "
            f"these layers use {fallback}"
        )
        if self.nowhere:
            line += f", which does not implement {_listed(self.nowhere)} either"
        return line


def decide(selector: AttentionSelectorConfig, fallback: type[AttentionBackend]) -> Decision:
    """Asks BMC, and ``fallback`` about what BMC lacks."""
    # CPUs have no compute capability.
    layer: dict[str, Any] = selector._asdict() | {"device_capability": None}
    ours = BMCAttentionBackend.validate_configuration(**layer)
    if not ours:
        return Decision((), ())
    known = {name: layer[name] for name in layer if name in (*KNOWN_FIELDS, "device_capability")}
    theirs = set(fallback.validate_configuration(**known))
    nowhere = tuple(_in_words(reason, selector) for reason in ours if reason in theirs)
    if IGNORED.intersection(theirs).issuperset(ours):
        return Decision((), nowhere)
    return Decision(tuple(_in_words(reason, selector) for reason in ours), nowhere)


def _in_words(reason: str, selector: AttentionSelectorConfig) -> str:
    layer = selector._asdict()
    plain = layer | {
        "dtype": str(selector.dtype).removeprefix("torch."),
        "attn_type": getattr(selector.attn_type, "value", selector.attn_type),
    }
    for pattern, words in WORDS.items():
        if pattern.format(**layer) == reason:
            return words.format(**plain)
    return reason.removesuffix(" not supported")


def _listed(features: tuple[str, ...]) -> str:
    return ", ".join(features)
