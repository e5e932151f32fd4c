"""Block managers on vLLM's real KVCacheManager, without an engine."""

from __future__ import annotations

import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from bmc_vllm.integrity import check_integrity
from bmc_vllm.kv_cache_interface import to_bmc_spec
from bmc_vllm.kv_cache_manager import GrowthState, configure_growth

BLOCK = 16
MAX_MODEL_LEN = 200
WINDOW = 40

register_all_kvcache_specs(None)
current_platform.register_custom_kv_cache_specs(None)
init_none_hash(sha256)
hasher = get_request_block_hasher(BLOCK, sha256)

FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
SLIDING = SlidingWindowSpec(
    block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32, sliding_window=WINDOW
)
KINDS = {"full": [FULL], "sliding": [SLIDING], "hybrid": [FULL, SLIDING, SLIDING]}


def make_manager(kind: str, num_blocks: int, r: int | None, caching: bool = True) -> KVCacheManager:
    """vLLM's manager, on our block managers with chunks of ``r`` rows, or (None) on its own."""
    groups = [
        KVCacheGroupSpec([f"layer{i}"], to_bmc_spec(spec) if r else spec)
        for i, spec in enumerate(KINDS[kind])
    ]
    manager = KVCacheManager(
        KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        max_in_flight_tokens=64,
        enable_caching=caching,
    )
    if r:
        growth = configure_growth(manager.coordinator.single_type_managers, r, requests := {})
        assert growth is not None
        growth.queue.remember_discarded()
        _made[id(manager)] = (manager, growth, requests)
    return manager


_made: dict[int, tuple[KVCacheManager, GrowthState, dict[str, Request]]] = {}


def growth_of(manager: KVCacheManager) -> GrowthState:
    return _made[id(manager)][1]


def make_request(name: str, tokens: list[int]) -> Request:
    return Request(name, tokens, SamplingParams(max_tokens=500), None, block_hasher=hasher)


def add_request(manager: KVCacheManager, name: str, tokens: list[int]) -> Request:
    """A request that the scheduler of ``manager`` knows."""
    request = make_request(name, tokens)
    if id(manager) in _made:
        _made[id(manager)][2][name] = request
    return request


def verify(manager: KVCacheManager) -> None:
    check_integrity(manager.block_pool, manager.coordinator.single_type_managers)
    if id(manager) in _made:
        growth_of(manager).queue.check()


def held(manager: KVCacheManager, request: Request, group: int = 0) -> list[int]:
    """Block ids of a request's table."""
    return [b.block_id for b in manager.coordinator.get_blocks(request.request_id)[group]]
