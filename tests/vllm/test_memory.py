"""The KV pool's memory: committed at start, or shared: resident where used, and given back."""

import psutil
import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from bmc_core.machine import memory as machine_memory
from bmc_core.machine.memory import PAGE, available_bytes, huge_page_bytes
from bmc_vllm.memory import KVPoolError, KVPoolMemory, gib, regions, release_bounds
from tests.support.engines import engine, flush, generate, prompts_of, scheduler, worker
from tests.support.mappings import wants_huge_pages
from tests.support.models import ModelStore

GIB = 1 << 30
SHARED = {"bmc": {"r": 128, "release_free_memory": True}}


def memory_of(llm) -> KVPoolMemory:
    return worker(llm)._memory


def test_the_pool_is_in_memory_from_the_start(model_dir: ModelStore, vllm_log: list[str]) -> None:
    with engine(model_dir("llama-gqa"), "BMC", kv_cache_memory_bytes=96 << 20) as llm:
        size = memory_of(llm).num_bytes
        assert 95 << 20 < size <= 96 << 20
        assert memory_of(llm).resident_bytes() == size
    said = f"BMC: KV pool: {gib(size)} reserved, {gib(size)} of it in memory"
    assert sum(said in line for line in vllm_log) == 1


def test_four_gib_of_shared_memory_cost_nothing_at_start(
    model_dir: ModelStore, vllm_log: list[str]
) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    settings = {"additional_config": SHARED, "kv_cache_memory_bytes": 4 * GIB}
    with engine(model_dir("llama-gqa"), "BMC", **settings) as llm:
        assert memory_of(llm).num_bytes > 3.9 * GIB
        assert memory_of(llm).resident_bytes() == 0
        assert any("4.00 GiB reserved, 0 MiB of it in memory" in line for line in vllm_log)
        assert process.memory_info().rss - before < GIB // 2
        generate(llm, prompts_of([300, 200]))
        used = memory_of(llm).resident_bytes()
        # 596 rows of 2 layers x 2 heads x 64 float32 = 1 KiB each per layer, in whole pages.
        assert 596 * 2 * 512 <= used < 64 << 20


def test_a_committed_pool_keeps_its_memory(model_dir: ModelStore) -> None:
    with engine(model_dir("llama-gqa"), "BMC", enable_prefix_caching=False) as llm:
        generate(llm, prompts_of([300]))
        flush(llm)
        assert memory_of(llm).resident_bytes() == memory_of(llm).num_bytes


@pytest.mark.parametrize("group_bytes", [None, 64 << 20])
def test_a_pool_that_does_not_fit_ends_the_start(
    group_bytes: int | None, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the machine has, and more than this process's control group may have."""
    size = available_bytes() + 2 * GIB
    if group_bytes is not None:
        size = 128 << 20
        for name, text in (
            ("memory.max", str(group_bytes)), ("memory.current", "0"), ("memory.stat", "")
        ):  # fmt: skip
            (tmp_path / name).write_text(text)
        (tmp_path / "cgroup").write_text("0::/\n")
        monkeypatch.setattr(machine_memory, "CONTROL_GROUPS", tmp_path)
        monkeypatch.setattr(machine_memory, "GROUPS_OF_PROCESS", tmp_path / "cgroup")
    before = psutil.Process().memory_info().rss
    memory = KVPoolMemory(size)
    with pytest.raises(KVPoolError) as refusal, memory.allocation():
        torch.zeros(size, dtype=torch.int8)
    assert "VLLM_CPU_KVCACHE_SPACE" in str(refusal.value)
    assert f"takes {gib(size)}" in str(refusal.value)
    if group_bytes is not None:
        assert f"{gib(group_bytes)} of memory are free" in str(refusal.value)
    assert psutil.Process().memory_info().rss - before < GIB // 4


def test_more_than_the_address_space_ends_the_start() -> None:
    with pytest.raises(KVPoolError, match="VLLM_CPU_KVCACHE_SPACE"):
        KVPoolMemory(1 << 60, shared=True).map()


def test_another_allocation_than_the_pools_is_torchs() -> None:
    memory = KVPoolMemory(5 * PAGE)
    with memory.allocation():
        torch.zeros(6 * PAGE, dtype=torch.int8)
        assert not memory.mapped
        pool = torch.zeros(5 * PAGE, dtype=torch.int8)
        assert memory.mapped
        assert torch.zeros(5 * PAGE, dtype=torch.int8).data_ptr() != pool.data_ptr()
    assert not pool.any()
    assert memory.resident_bytes() == 5 * PAGE


def test_freed_blocks_are_given_back(model_dir: ModelStore) -> None:
    prompts = prompts_of([300, 200, 100])
    with engine(model_dir("llama-gqa"), "CPU_ATTN") as llm:
        expected = generate(llm, prompts)
    with engine(
        model_dir("llama-gqa"),
        "BMC",
        enable_prefix_caching=False,
        additional_config=SHARED,
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
        additional_config=SHARED,
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
    memory = KVPoolMemory(tensor.size, shared=True)
    with memory.allocation():
        pool = torch.zeros(tensor.size, dtype=torch.int8, device="cpu")
        other = torch.zeros(7, dtype=torch.int8)
    memory.set_layout(config)
    assert other.data_ptr() != pool.data_ptr()
    assert memory.resident_bytes() == 0
    pool.fill_(1)
    resident = memory.resident_bytes()
    assert resident >= tensor.size
    memory.release([range(2, 5), range(8, 9)])
    if page >= 3 * PAGE:
        assert memory.resident_bytes() < resident
    heads = 2 if order == "LHBNC" else 1
    pieces = pool.as_strided(
        (3, 10, heads, page // heads),
        (tensor.layer_stride, tensor.block_stride, tensor.block_stride * 10, 1),
    )
    kept = [block for block in range(10) if block not in (2, 3, 4, 8)]
    assert bool((pieces[:, kept] == 1).all())
    if page == 6 * PAGE:
        assert not bool((pieces[:, [2, 3, 4]] == 1).all())


def test_release_before_allocation_does_nothing() -> None:
    memory = KVPoolMemory(PAGE)
    memory.release([range(1, 3)])
    assert memory.resident_bytes() == 0


def test_what_lies_side_by_side_is_released_with_one_call() -> None:
    assert len(regions(layout(PAGE, 10, 3, "LHBNC"))) == 6
    assert len(regions(layout(PAGE, 10, 3, "LBHNC"))) == 3
    assert len(regions(layout(PAGE, 10, 3, "BLHNC"))) == 1, "the layers of a block"


def test_a_step_gives_back_what_goes_unnoticed() -> None:
    max_runs, max_blocks = release_bounds(layout(16 << 10, 1000, 128, "LHBNC"))
    assert max_runs == 1, "256 system calls for 128 layers of two heads"
    assert max_blocks == 16, "32 MiB of 2 MiB a block"
    assert release_bounds(layout(PAGE, 10, 1, "LBHNC")) == (256, 256 * 32)


def test_the_rest_of_a_backlog_goes_when_the_engine_idles(model_dir: ModelStore) -> None:
    with engine(
        model_dir("llama-gqa"), "BMC", enable_prefix_caching=False, additional_config=SHARED
    ) as llm:
        scheduler(llm)._release_bounds = (1, 1)
        long, short = prompts_of([400, 20])
        generate(llm, [long], max_tokens=1)
        peak = memory_of(llm).resident_bytes()
        generate(llm, [short], max_tokens=4)
        assert 0 < memory_of(llm).resident_bytes() < peak
        flush(llm)
        assert memory_of(llm).resident_bytes() == 0
