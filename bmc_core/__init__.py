"""Framework-neutral core of BMC: growth policy, attention over r-row chunks, native kernels.

Knows torch tensors and nothing of vLLM, transformers or DeepSpeed; importing it imports none of
them, and not torch either until one of the names below is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmc_core.attention import AttentionBatch, paged_attention, write_kv
    from bmc_core.costs.calibration import auto_policy, calibrate
    from bmc_core.costs.geometry import Geometry
    from bmc_core.kv_store import KVStore, PackedStore, RowsStore
    from bmc_core.policy import BMCPolicy

_HOMES = {
    "AttentionBatch": "bmc_core.attention",
    "paged_attention": "bmc_core.attention",
    "write_kv": "bmc_core.attention",
    "auto_policy": "bmc_core.costs.calibration",
    "calibrate": "bmc_core.costs.calibration",
    "Geometry": "bmc_core.costs.geometry",
    "KVStore": "bmc_core.kv_store",
    "PackedStore": "bmc_core.kv_store",
    "RowsStore": "bmc_core.kv_store",
    "BMCPolicy": "bmc_core.policy",
}

__all__ = [
    "AttentionBatch",
    "BMCPolicy",
    "Geometry",
    "KVStore",
    "PackedStore",
    "RowsStore",
    "auto_policy",
    "calibrate",
    "paged_attention",
    "write_kv",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
