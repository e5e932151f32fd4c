"""What the plugin leans on in vLLM 0.31 and 0.32 beyond its documented plugin interface.

One test per hook: when vLLM moves it, the test that fails says which file of ``bmc_vllm`` to open.
"""

import inspect
import pickle

import pytest
import torch
from packaging.version import Version
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.worker import utils as worker_utils
from vllm.v1.worker.cpu_worker import CPUWorker

from bmc_vllm import vllm_0_31
from bmc_vllm.free_chunks import ChunkedFreeQueue
from bmc_vllm.plugin import vllm_version

IS_0_31 = Version(vllm_version()).release[:2] == (0, 31)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_free_chunks_queue() -> None:
    """free_chunks.py: every way into and out of the free queue is one of these methods, and
    blocks that hold nothing are put in front of cached ones."""
    methods = {name for name in vars(FreeKVCacheBlockQueue) if not name.startswith("__")}
    changing = {"popleft", "popleft_n", "remove", "append", "append_n", "prepend_n"}
    assert methods == changing | {"get_all_free_blocks", "iter_blocks_after"}
    assert changing <= set(vars(ChunkedFreeQueue))
    pool = BlockPool(num_gpu_blocks=5, enable_caching=True, hash_block_size=16)
    queue = pool.free_block_queue
    assert set(vars(queue)) == {"num_free_blocks", "fake_free_list_head", "fake_free_list_tail"}
    assert [b.block_id for b in queue.get_all_free_blocks()] == [1, 2, 3, 4]
    taken = pool.get_new_blocks(3)
    assert taken[0].prev_free_block is None
    assert pool.blocks[4].prev_free_block is not None
    taken[0].set_block_hash(b"hash")
    pool.free_blocks(taken)
    assert [b.block_id for b in queue.get_all_free_blocks()] == [2, 3, 4, 1]
    assert "self.free_block_queue.popleft_n(num_blocks)" in inspect.getsource(pool.get_new_blocks)


def test_kv_cache_manager_allocation() -> None:
    """kv_cache_manager.py: vLLM allocates by length, and frees through pop_blocks_for_free."""
    assert parameters(SingleTypeKVCacheManager.allocate_new_blocks) == [
        "self",
        "request_id",
        "num_tokens",
        "num_tokens_main_model",
    ]
    assert parameters(SingleTypeKVCacheManager.allocate_external_computed_blocks) == [
        "self",
        "request_id",
        "num_local_computed_tokens",
        "num_external_computed_tokens",
        *([] if IS_0_31 else ["record_for_zeroing"]),
    ]
    assert "pop_blocks_for_free" in inspect.getsource(SingleTypeKVCacheManager.free)


@pytest.mark.parametrize("new_names", [False, True])
def test_vllm_0_31_register_attention_backend(
    new_names: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm_0_31.py: a name of ours is a member like vLLM's own; 0.31 takes none by itself."""
    registry = AttentionBackendEnum
    assert hasattr(registry, "register") != IS_0_31
    if new_names and IS_0_31:
        pytest.skip("this vLLM takes no new names")
    if not new_names:
        monkeypatch.delattr(registry, "register", raising=False)
    known = list(registry)
    try:
        vllm_0_31.register_attention_backend("HOOK_TEST", "torch.nn.Module")
        member = registry["HOOK_TEST"]
        assert list(registry) == [*known, member]
        assert (member.name, member.get_class()) == ("HOOK_TEST", torch.nn.Module)
        assert registry("torch.nn.Module") is pickle.loads(pickle.dumps(member)) is member
    finally:
        registry._member_map_.pop("HOOK_TEST")
        registry._value2member_map_.pop("torch.nn.Module")
        registry._member_names_.remove("HOOK_TEST")
        delattr(registry, "HOOK_TEST")


def test_scheduler_steps() -> None:
    """scheduler.py: one make_stats per step, and a step's output takes one more attribute."""
    assert "self.make_stats(" in inspect.getsource(Scheduler.update_from_output)
    output = SchedulerOutput.make_empty()
    output.bmc_released_blocks = [1]  # type: ignore[attr-defined]
    assert output.bmc_released_blocks == [1]  # type: ignore[attr-defined]


def test_worker_allocates_inside_the_context() -> None:
    """worker.py: the worker names the context in which its KV cache is allocated."""
    assert parameters(CPUWorker._maybe_get_memory_pool_context) == ["self", "tag"]
    assert 'tag="kv_cache"' in inspect.getsource(CPUWorker.initialize_from_config)


def test_memory_pool_is_one_torch_zeros() -> None:
    """memory.py: allocate_kv_cache makes the whole pool with one int8 torch.zeros."""
    source = inspect.getsource(worker_utils.allocate_kv_cache)
    assert source.count("torch.zeros(") == 1
    assert "torch.zeros(buf_size, dtype=torch.int8" in source
    assert torch.zeros(1, dtype=torch.int8).dtype is torch.int8
