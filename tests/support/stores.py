"""Rows for the KV stores of bmc_core, and stores filled with them."""

from __future__ import annotations

import torch

from bmc_core.kv_store import KVStore, PackedStore, RowsStore

HEADS, SIZE = 2, 32
LAYOUTS = {"rows": RowsStore, "packed": PackedStore}


def random_rows(batch: int, rows: int, dtype: torch.dtype = torch.float32, size: int = SIZE):
    """K and V, their memory laid out as a model's projections give it."""
    return tuple(torch.randn(batch, rows, HEADS, size).to(dtype).transpose(1, 2) for _ in "kv")


def filled(store: KVStore, batch: int = 3, rows: int = 40) -> KVStore:
    store.append(*random_rows(batch, rows))
    return store
