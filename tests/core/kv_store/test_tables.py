"""Index tensors of a step: made once for a shape, right, and never more than a few."""

from __future__ import annotations

import copy
import pickle

import torch

from bmc_core.kv_store import PackedStore, StepTables
from bmc_core.kv_store.tables import MAX_STEPS
from bmc_core.policy import BMCPolicy
from tests.support.stores import random_rows


def test_slots_are_where_the_rows_go() -> None:
    slots = StepTables().slots(3, 48, 17, 2)
    assert slots.tolist() == [17, 18, 48 + 17, 48 + 18, 96 + 17, 96 + 18]
    assert slots.dtype == torch.int64


def test_the_same_shape_gives_the_same_tensors() -> None:
    tables = StepTables()
    first = torch.tensor([0, 3], dtype=torch.int32)
    assert tables.slots(2, 48, 17, 2) is tables.slots(2, 48, 17, 2)
    assert tables.slots(2, 48, 17, 2) is not tables.slots(2, 48, 19, 2)
    batch = tables.batch(2, 48, 19, 2, first_rows=first)
    assert tables.batch(2, 48, 19, 2, first_rows=first) is batch
    assert tables.batch(2, 48, 19, 2, first_rows=first.clone()) is not batch
    assert tables.batch(2, 48, 19, 2) is not batch


def test_no_more_than_a_few_are_kept() -> None:
    tables = StepTables()
    for length in range(1, 3 * MAX_STEPS):
        tables.slots(1, 128, length, 1)
        tables.batch(length % 50 + 1, 128, length, 1)
        assert len(tables._slots) <= MAX_STEPS
        assert len(tables._batches) <= MAX_STEPS
        assert len(tables._sequences) <= MAX_STEPS


def test_stores_of_one_cache_share_them_and_copies_begin_anew() -> None:
    tables = StepTables()
    stores = [PackedStore(BMCPolicy(r=32), tables=tables) for _ in range(4)]
    query = torch.randn(2, 2, 1, 32)
    for store in stores:
        store.append(*random_rows(2, 20))
        store.attend(query, scale=1.0)
    assert len(tables._slots) == len(tables._batches) == 1
    for twin in (copy.deepcopy(tables), pickle.loads(pickle.dumps(tables))):
        assert not twin._slots
        assert torch.equal(twin.slots(2, 32, 0, 20), tables.slots(2, 32, 0, 20))
