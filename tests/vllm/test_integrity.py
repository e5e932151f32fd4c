"""Every kind of contradiction between pool and block tables is found and named."""

from collections.abc import Callable

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheManager

from bmc_vllm.integrity import IntegrityError
from tests.support.managers import make_manager, make_request, verify


@pytest.fixture
def manager() -> KVCacheManager:
    """Request "a" holds three blocks and the spare one of its chunk; two of them are cached."""
    manager = make_manager("full", 30, r=64)
    manager.allocate_slots(make_request("a", list(range(40))), 40)
    return manager


def tables(manager: KVCacheManager) -> dict:
    return manager.coordinator.single_type_managers[0].req_to_blocks


def share(manager: KVCacheManager) -> None:
    tables(manager)["b"] = tables(manager)["a"][:1]


def leak(manager: KVCacheManager) -> None:
    tables(manager)["a"].pop().ref_cnt = 0


def repeat(manager: KVCacheManager) -> None:
    tables(manager)["a"].append(tables(manager)["a"][0])


def free_what_is_owned(manager: KVCacheManager) -> None:
    manager.block_pool.free_block_queue.append(tables(manager)["a"][-1])


def lose_a_hash(manager: KVCacheManager) -> None:
    manager.block_pool.cached_block_hash_to_block._cache.clear()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (share, "ref_cnt 1, 2 owners"),
        (leak, "leaked"),
        (repeat, "a block stands twice in"),
        (free_what_is_owned, "free and owned by 1"),
        (lose_a_hash, "carries a hash that is not cached"),
    ],
)
def test_the_fault_is_named(
    manager: KVCacheManager, damage: Callable[[KVCacheManager], None], fault: str
) -> None:
    verify(manager)
    damage(manager)
    with pytest.raises(IntegrityError, match=fault):
        verify(manager)


def test_retained_blocks_have_an_owner(manager: KVCacheManager) -> None:
    """Blocks of a free that vLLM defers are owned by nobody's table."""
    from bmc_vllm.integrity import check_integrity

    retained = tables(manager).pop("a")
    managers = manager.coordinator.single_type_managers
    check_integrity(manager.block_pool, managers, retained)
    with pytest.raises(IntegrityError, match="ref_cnt 1, 0 owners"):
        check_integrity(manager.block_pool, managers)
