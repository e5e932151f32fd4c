"""A store of each layout."""

import pytest

from bmc_core.kv_store import KVStore
from bmc_core.policy import BMCPolicy
from tests.support.stores import LAYOUTS


@pytest.fixture(params=LAYOUTS)
def store(request) -> KVStore:
    return LAYOUTS[request.param](BMCPolicy(r=32))
