"""What the plugin leans on in vLLM 0.31 and 0.32 beyond its documented plugin interface.

One test per hook: when vLLM moves it, the test that fails says which file of ``bmc_vllm`` to open.
"""

import inspect
import os
import pickle

import pytest
import torch
from packaging.version import Version
from prometheus_client import CollectorRegistry
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import attention as attention_layer
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.core import single_type_kv_cache_manager
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.metrics import prometheus
from vllm.v1.spec_decode.dflash import DFlashProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker import utils as worker_utils
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from bmc_core.attention import AttentionBatch
from bmc_vllm import vllm_0_31
from bmc_vllm.attention import KNOWN_FIELDS, BMCAttentionImpl, BMCAttentionMetadata
from bmc_vllm.free_chunks import ChunkedFreeQueue
from bmc_vllm.platform import STOCK_WORKER_CLASS
from bmc_vllm.plugin import vllm_version
from bmc_vllm.selector import WORDS

IS_0_31 = Version(vllm_version()).release[:2] == (0, 31)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_selector_fields() -> None:
    """selector.py, attention.py: a layer is described by these fields, and each reason for which
    a backend is refused is one that we have words for. A new field makes layers fall back."""
    assert AttentionSelectorConfig._fields == KNOWN_FIELDS
    asked = set(parameters(AttentionBackend.validate_configuration)) - {"device_capability"}
    assert asked == set(KNOWN_FIELDS)
    source = inspect.getsource(AttentionBackend.validate_configuration)
    source = source.replace('"\n                "', "")  # a string in two parts
    assert [reason for reason in WORDS if f'"{reason}"' not in source] == []


def test_a_drafter_asks_the_metadata_whether_it_is_causal() -> None:
    """attention.py: vLLM's drafter ends the engine unless the metadata says that it is not."""
    source = inspect.getsource(DFlashProposer.build_per_group_and_layer_attn_metadata)
    assert 'getattr(attn_metadata, "causal", None) is False' in source
    starts, lengths = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    table = torch.tensor([[1]], dtype=torch.int32)
    for causal in (False, True):
        batch = AttentionBatch(starts, lengths, table, 16, causal=causal)
        assert BMCAttentionMetadata(batch, 3).causal is causal


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
    output.bmc_released_blocks = [range(1)]  # type: ignore[attr-defined]
    assert output.bmc_released_blocks == [range(1)]  # type: ignore[attr-defined]


def test_draft_tokens_come_by_the_scheduler() -> None:
    """drafts.py: where K is read, drafts are handed over and counted, and requests end; and what
    the runner does within K tokens of the longest sequence."""
    assert SchedulerOutput.make_empty().num_spec_tokens_to_schedule == 0
    assert "self.make_spec_decoding_stats(" in inspect.getsource(Scheduler.update_from_output)
    assert parameters(Scheduler.make_spec_decoding_stats) == [
        "self",
        "spec_decoding_stats",
        "num_draft_tokens",
        "num_accepted_tokens",
        "num_invalid_spec_tokens",
        "request_id",
    ]
    source = inspect.getsource(Scheduler.schedule)
    assert "self.dynamic_sd_lookup is None" in source
    assert "num_lookahead_tokens=self.num_lookahead_tokens" in source
    assert "self._preempt_request(" in source
    assert "self._free_request(" in inspect.getsource(Scheduler.update_from_output)
    assert "self._free_request(" in inspect.getsource(Scheduler.finish_requests)
    fits = inspect.getsource(GPUModelRunner._input_fits_in_drafter)
    assert "common_attn_metadata.max_seq_len + num_drafter_query_tokens" in fits


def test_block_tables_only_grow() -> None:
    """spare_rows.py: what a worker's block table is made of."""
    source = inspect.getsource(BlockTable.append_row)
    assert "start = self.num_blocks_per_row[row_idx]" in source
    assert "self.block_table.np[row_idx, start : start + num_blocks] = block_ids" in source
    source = inspect.getsource(GPUModelRunner._update_states)
    assert "zip(req_state.block_ids, new_block_ids)" in source
    assert "self.input_batch.block_table.append_row(new_block_ids, req_index)" in source


def test_generators_of_discarded_tokens() -> None:
    """generators.py: the runner sets the generators that it finds in the batch back by an offset,
    and samples with the same mapping; the worker's method is all that calls it."""
    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "self.discard_request_mask.np[:num_reqs]" in source
    assert "gen = self.input_batch.generators.get(int(i))" in source
    assert "gen.set_offset(gen.get_offset() - 4)" in source
    assert "generators=self.generators," in inspect.getsource(InputBatch._make_sampling_metadata)
    assert "self.model_runner.sample_tokens(" in inspect.getsource(CPUWorker.sample_tokens)


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


def test_metrics_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """metrics.py: with several API servers the variable names the folder that /metrics adds up;
    without, /metrics reads the registry of its process."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert prometheus.get_prometheus_registry() is prometheus.REGISTRY
    monkeypatch.setattr(prometheus, "_prometheus_multiproc_dir", None)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "here")  # put back at the end
    del os.environ["PROMETHEUS_MULTIPROC_DIR"]
    prometheus.setup_multiprocess_prometheus()
    assert os.path.isdir(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    assert prometheus.get_prometheus_registry() is not prometheus.REGISTRY


def test_prometheus_files(tmp_path) -> None:
    """metrics.py: the format of prometheus_client's files, and what their names say."""
    for process, value in (("bmc-1-0", 2.0), ("bmc-2-0", 3.0)):
        for kind, sample in (("counter", "a_total"), ("gauge_livesum", "a")):
            values = MmapedDict(str(tmp_path / f"{kind}_{process}.db"))
            key = mmap_key(kind, sample, ["engine"], ["0"], "Help.")
            values.write_value(key, value, 0.0)
            values.close()
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    found = {
        (m.name, m.type, s.name): (s.labels, s.value) for m in registry.collect() for s in m.samples
    }
    assert found == {
        ("counter", "counter", "a_total"): ({"engine": "0"}, 5.0),
        ("gauge_livesum", "gauge", "a"): ({"engine": "0"}, 5.0),
    }


def test_instance_id() -> None:
    """metrics.py: a configuration names its engine before the platform completes it, and the name
    goes to the engine's processes with it."""
    first, second = VllmConfig(), VllmConfig()
    assert first.instance_id
    assert first.instance_id != second.instance_id
    source = inspect.getsource(VllmConfig.__post_init__)
    assert source.index("self.instance_id") < source.index("check_and_update_config(self)")


def test_block_pool_takes_no_place() -> None:
    """kv_cache_manager.py and patches/: a manager cannot say where its next block should lie."""
    assert parameters(BlockPool.get_new_blocks) == ["self", "num_blocks"]


def test_managers_that_allocate_in_their_own_way() -> None:
    """kv_cache_manager.py: those we build on take vLLM's general method."""
    own = {
        name
        for name, manager in vars(single_type_kv_cache_manager).items()
        if isinstance(manager, type)
        and issubclass(manager, SingleTypeKVCacheManager)
        and manager is not SingleTypeKVCacheManager
        and "allocate_new_blocks" in vars(manager)
    }
    assert own == {
        "CircularBufferManager",
        "MambaManager",
        "HiSparseHotManager",
        "HiSparseResidentManager",
    }


def test_attention_backend_customizes_the_spec() -> None:
    """attention.py: a layer's spec passes through its backend. vLLM calls this a temporary
    interface; where it goes away, the backend makes the spec itself."""
    assert parameters(AttentionBackend.customize_spec) == ["spec"]
    source = inspect.getsource(attention_layer.Attention.get_kv_cache_spec)
    assert "customize_spec" in source


def test_kv_cache_specs_are_registered_by_the_platform() -> None:
    """platform.py: vLLM asks the platform once for specs of its own, with their managers."""
    assert parameters(Platform.register_custom_kv_cache_specs) == ["vllm_config"]
    source = inspect.getsource(single_type_kv_cache_manager.register_all_kvcache_specs)
    assert "current_platform.register_custom_kv_cache_specs(vllm_config)" in source
    assert parameters(KVCacheSpecRegistry.register)[:3] == [
        "kvcache_spec_cls",
        "manager_class",
        "uniform_type_base_spec",
    ]


def test_platform_completes_the_configuration() -> None:
    """platform.py: our hook has the last word, once for each configuration that vLLM makes."""
    assert parameters(Platform.check_and_update_config) == ["vllm_config"]
    source = inspect.getsource(VllmConfig.__post_init__)
    assert source.count("current_platform.check_and_update_config(self)") == 1


def test_platform_sets_the_worker() -> None:
    """platform.py: the class that ours takes the place of."""
    source = inspect.getsource(CpuPlatform.check_and_update_config)
    assert f'parallel_config.worker_cls = "{STOCK_WORKER_CLASS}"' in source
    assert f"{CPUWorker.__module__}.{CPUWorker.__name__}" == STOCK_WORKER_CLASS


def test_platform_chooses_the_backend() -> None:
    """platform.py: called with the user's choice and the layer's properties."""
    assert parameters(CpuPlatform.get_attn_backend_cls) == [
        "selected_backend",
        "attn_selector_config",
        "num_heads",
    ]


def test_draft_takes_the_named_backend() -> None:
    """platform.py: a draft's backend is read after the platform has completed the configuration,
    and is never the target's."""
    source = inspect.getsource(SpecDecodeBaseProposer._create_draft_vllm_config)
    assert "backend=spec_cfg.attention_backend" in source


def test_attention_impl_signatures() -> None:
    """attention.py: what a layer hands to its implementation; CPU_ATTN's is the pattern."""
    for method in ("__init__", "forward", "do_kv_cache_update"):
        stock = parameters(getattr(CPUAttentionBackendImpl, method))
        assert parameters(getattr(BMCAttentionImpl, method)) == stock


def test_layers_are_in_the_forward_context() -> None:
    """layout.py: a layer tells its backend, its spec, and the pool's layout is one name."""
    assert parameters(AttentionLayerBase.get_attn_backend) == ["self"]
    assert parameters(AttentionLayerBase.get_kv_cache_spec) == ["self", "vllm_config"]
    assert parameters(CacheConfig.get_resolved_kv_cache_layout) == ["self"]
    assert CPUAttentionBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)


def test_drafting_steps_are_the_schedulers_choice() -> None:
    """drafters/drafting.py: the runner asks the drafter through these methods, in this order, and
    the number of steps comes with the scheduler's output."""
    assert SchedulerOutput.make_empty().num_spec_tokens_to_schedule == 0
    assert parameters(GPUModelRunner._input_fits_in_drafter) == ["self", "common_attn_metadata"]
    assert parameters(GPUModelRunner.propose_draft_token_ids)[1:] == [
        "scheduler_output",
        "sampled_token_ids",
        "sampling_metadata",
        "hidden_states",
        "sample_hidden_states",
        "aux_hidden_states",
        "spec_decode_metadata",
        "common_attn_metadata",
        "slot_mappings",
    ]
    source = inspect.getsource(GPUModelRunner.sample_tokens)
    order = [
        "self._input_fits_in_drafter(",
        "self._draft_token_ids = torch.zeros(",
        "self._bookkeeping_sync(",
    ]
    assert order == sorted(order, key=source.index)
    source = inspect.getsource(GPUModelRunner.propose_draft_token_ids)
    assert source.count("scheduler_output.num_spec_tokens_to_schedule") == 1


def test_a_draft_models_forward_pass() -> None:
    """drafters/catch_up.py: what a drafter's first pass is made of."""
    source = inspect.getsource(SpecDecodeBaseProposer.propose)
    for call in (
        "self.build_per_group_and_layer_attn_metadata(",
        "self._determine_batch_execution_and_padding(",
        "self.build_model_inputs_first_pass(",
        "self._get_slot_mapping(",
        "self.model(**model_kwargs)",
    ):
        assert call in source
    assert "num_computed_tokens_cpu[" in inspect.getsource(GPUModelRunner._update_states)


def test_dummy_steps() -> None:
    """drafters/calibration.py: a step of any number of rows, without requests, and its drafter."""
    assert {"num_tokens", "force_attention", "skip_eplb"} <= set(
        parameters(GPUModelRunner._dummy_run)
    )
    assert "self.drafter.dummy_run(" in inspect.getsource(GPUModelRunner._dummy_run)
