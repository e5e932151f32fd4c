"""KV cache specs whose blocks are handed out by the BMC managers.

The specs add no field: they are markers by which ``KVCacheSpecRegistry`` finds the manager, so
that vLLM can compare, merge, promote and copy them like its own. Knows nothing of growth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)


@dataclass(frozen=True, kw_only=True)
class BMCFullAttentionSpec(FullAttentionSpec):
    """Full attention, grown in chunks."""


@dataclass(frozen=True, kw_only=True)
class BMCSlidingWindowSpec(SlidingWindowSpec):
    """Sliding window attention, grown in chunks; blocks behind the window are freed as usual."""


_BMC_SPECS: dict[type[AttentionSpec], Any] = {
    FullAttentionSpec: BMCFullAttentionSpec,
    SlidingWindowSpec: BMCSlidingWindowSpec,
}


def to_bmc_spec(spec: AttentionSpec) -> AttentionSpec:
    """The BMC marker of ``spec``; specs of other kinds (chunked local, ...) stay as they are."""
    bmc_spec = _BMC_SPECS.get(type(spec))
    if bmc_spec is None:
        return spec
    return bmc_spec(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})


def is_bmc_spec(spec: KVCacheSpec) -> bool:
    """Whether the blocks of ``spec`` are handed out by a BMC manager."""
    return isinstance(spec, tuple(_BMC_SPECS.values()))
