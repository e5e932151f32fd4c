"""Counts of growths, copies and bytes, of one store or of several together."""

from __future__ import annotations

from bmc_core.kv_store import KVCounters, RowsStore
from bmc_core.policy import BMCPolicy
from tests.support.stores import filled


def test_counters_may_be_shared() -> None:
    counters = KVCounters()
    stores = [RowsStore(BMCPolicy(r=16), counters=counters) for _ in range(3)]
    for one in stores:
        filled(one)
    assert counters.growths == 3
    assert counters.bytes_held == sum(one.num_bytes for one in stores)
    stores[0].release()
    assert counters.bytes_held == sum(one.num_bytes for one in stores[1:])
    assert stores[0].length == stores[0].capacity == stores[0].num_bytes == 0
