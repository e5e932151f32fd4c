"""The chunked KV store, in two layouts: plain rows, and packed for the native attention kernel."""

from bmc_core.kv_store.base import KVStore, reorder_stores
from bmc_core.kv_store.counters import KVCounters
from bmc_core.kv_store.interrupts import uninterrupted
from bmc_core.kv_store.packed import PackedStore, why_not_packed
from bmc_core.kv_store.rows import RowsStore
from bmc_core.kv_store.tables import StepTables

__all__ = [
    "KVCounters",
    "KVStore",
    "PackedStore",
    "RowsStore",
    "StepTables",
    "reorder_stores",
    "uninterrupted",
    "why_not_packed",
]
