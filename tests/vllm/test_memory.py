"""The KV pool's memory: not resident at start, resident where used, given back when asked."""

import psutil
import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from bmc_core.machine.memory import PAGE, huge_page_bytes
from bmc_vllm.memory import KVPoolMemory
from tests.support.engines import engine, flush, generate, prompts_of, worker
from tests.support.mappings import wants_huge_pages
from tests.support.models import ModelStore

GIB = 1 << 30


def memory_of(llm) -> KVPoolMemory:
    return worker(llm)._memory


def test_four_gib_of_kv_space_cost_nothing_at_start(model_dir: ModelStore) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    with engine(model_dir("llama-gqa"), "BMC", kv_cache_memory_bytes=4 * GIB) as llm:
        assert memory_of(llm).num_bytes > 3.9 * GIB
        assert memory_of(llm).resident_bytes() == 0
        assert process.memory_info().rss - before < GIB // 2
        generate(llm, prompts_of([300, 200]))
        used = memory_of(llm).resident_bytes()
        # 596 rows of 2 layers x 2 heads x 64 float32 = 1 KiB each per layer, in whole (huge) pages.
        assert 596 * 2 * 512 <= used < 64 << 20
        # Off by default: finished requests keep their pages.
        flush(llm)
        assert memory_of(llm).resident_bytes() == used


def test_freed_blocks_are_given_back(model_dir: ModelStore) -> None:
    prompts = prompts_of([300, 200, 100])
    with engine(model_dir("llama-gqa"), "CPU_ATTN") as llm:
        expected = generate(llm, prompts)
    with engine(
        model_dir("llama-gqa"),
        "BMC",
        enable_prefix_caching=False,
        additional_config={"bmc": {"r": 128, "release_free_memory": True}},
    ) as llm:
        for _ in range(2):
            assert generate(llm, prompts) == expected
            assert memory_of(llm).resident_bytes() > 0
            flush(llm)
            assert memory_of(llm).resident_bytes() == 0


def test_cached_prefixes_keep_their_memory(model_dir: ModelStore) -> None:
    prompts = prompts_of([300])
    with engine(
        model_dir("llama-gqa"),
        "BMC",
        additional_config={"bmc": {"r": 128, "release_free_memory": True}},
    ) as llm:
        first = generate(llm, prompts)
        flush(llm)
        assert memory_of(llm).resident_bytes() > 0
        # The second run reads the cached rows back: zeros would change the tokens.
        assert generate(llm, prompts) == first


@pytest.mark.skipif(not huge_page_bytes(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize("release", [False, True])
def test_the_pool_is_on_huge_pages_unless_memory_is_released(
    model_dir: ModelStore, release: bool
) -> None:
    """A huge page goes back to the system only as a whole."""
    settings = {"bmc": {"release_free_memory": release}}
    with engine(model_dir("llama-gqa"), "BMC", additional_config=settings) as llm:
        pools = worker(llm).model_runner.kv_caches
        assert pools
        assert all(wants_huge_pages(pool) is not release for pool in pools)


def layout(page: int, num_blocks: int, num_layers: int, order: str) -> KVCacheConfig:
    """Strides of vLLM's layouts; `page` is what one layer stores of a block, over two heads."""
    layer_stride, block_stride = {
        "LBHNC": (page * num_blocks, page),
        "LHBNC": (page * num_blocks, page // 2),
        "BLHNC": (page, page * num_layers),
    }[order]
    tensor = KVCacheTensor(
        size=page * num_blocks * num_layers,
        layers=[f"layer{i}" for i in range(num_layers)],
        layer_stride=layer_stride,
        block_stride=block_stride,
    )
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[tensor], kv_cache_groups=[])


@pytest.mark.parametrize("order", ["LBHNC", "LHBNC", "BLHNC"])
@pytest.mark.parametrize("page", [512, PAGE, PAGE + 512, 3 * PAGE, 6 * PAGE])
def test_release_touches_only_its_blocks(page: int, order: str) -> None:
    """Pages that a block shares with its neighbor stay; every layout."""
    config = layout(page, 10, 3, order)
    tensor = config.kv_cache_tensors[0]
    memory = KVPoolMemory()
    with memory.allocation():
        pool = torch.zeros(tensor.size, dtype=torch.int8, device="cpu")
        other = torch.zeros(7, dtype=torch.int8)
    memory.set_layout(config)
    assert memory.num_bytes == tensor.size
    assert other.data_ptr() != pool.data_ptr()
    assert memory.resident_bytes() == 0
    pool.fill_(1)
    resident = memory.resident_bytes()
    assert resident >= tensor.size
    released = [2, 3, 4, 8]
    memory.release(released)
    if page >= 3 * PAGE:
        assert memory.resident_bytes() < resident
    heads = 2 if order == "LHBNC" else 1
    pieces = pool.as_strided(
        (3, 10, heads, page // heads),
        (tensor.layer_stride, tensor.block_stride, tensor.block_stride * 10, 1),
    )
    kept = [block for block in range(10) if block not in released]
    assert bool((pieces[:, kept] == 1).all())
    if page == 6 * PAGE:
        assert not bool((pieces[:, [2, 3, 4]] == 1).all())


def test_release_before_allocation_does_nothing() -> None:
    memory = KVPoolMemory()
    memory.release([1, 2])
    assert memory.resident_bytes() == 0
