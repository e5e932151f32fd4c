"""Which layers and settings the platform takes, falls back for, or refuses."""

from collections import namedtuple

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from bmc_core.log import forget
from tests.support.engines import engine, generate, prompts_of, scheduler, worker
from tests.support.models import ModelStore

BMC_CLASS = "bmc_vllm.attention.BMCAttentionBackend"
CPU_CLASS = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"


@pytest.fixture(autouse=True)
def every_line_is_new() -> None:
    forget()


def selector(**changes: object) -> AttentionSelectorConfig:
    layer = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None}
    return AttentionSelectorConfig(**{**layer, **changes})  # type: ignore[arg-type]


def choose(backend: str | None, **changes: object) -> str:
    member = None if backend is None else AttentionBackendEnum[backend]
    return current_platform.get_attn_backend_cls(member, attn_selector_config=selector(**changes))


def test_not_selected_is_stock() -> None:
    assert choose(None) == CPU_CLASS
    assert choose("CPU_ATTN") == CPU_CLASS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [32, 48, 128, 256])
def test_selected(dtype: torch.dtype, head_size: int) -> None:
    assert choose("BMC", dtype=dtype, head_size=head_size) == BMC_CLASS
    assert choose("BMC", has_sliding_window=True, has_sink=True) == BMC_CLASS


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"attn_type": AttentionType.ENCODER_ONLY}, "'encoder_only'"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "'encoder_decoder'"),
        ({"use_mla": True, "head_size": 576}, "MLA"),
        (
            {"kv_cache_dtype": "int8_per_token_head"},
            "kv_cache_dtype='int8_per_token_head' with dtype bfloat16",
        ),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype='float16' with dtype bfloat16"),
        ({"head_size": 512}, "head size 512"),
        ({"head_size": 40}, "head size 40"),
        ({"use_kv_connector": True}, "a KV connector (kv_transfer_config)"),
        ({"use_dcp": True}, "decode context parallelism"),
        ({"use_pcp": True}, "prefill context parallelism"),
        ({"use_per_head_quant_scales": True}, "per-head quantization scales"),
        ({"use_adaptive_verification": True}, "adaptive verification"),
        ({"has_sliding_window": True, "use_non_causal": True}, "sliding window with non-causal"),
        ({"use_mm_prefix": True, "head_size": 512}, "head size 512, bidirectional"),
    ],
)
def test_falls_back_with_one_log_line(changes: dict, feature: str, vllm_log: list[str]) -> None:
    stock = choose(None, **changes)
    for _ in range(3):
        assert choose("BMC", **changes) == stock
    (line,) = [line for line in vllm_log if "attention backend BMC" in line]
    assert line.startswith("attention backend BMC does not support ")
    assert feature in line
    assert f"these layers use {resolve_obj_by_qualname(stock).get_name()}" in line


@pytest.mark.parametrize(
    ("changes", "either"),
    [
        ({"use_dcp": True}, ", which does not implement decode context parallelism either"),
        ({"head_size": 40}, ", which does not implement head size 40 either"),
        ({"head_size": 48}, None),
        ({"use_kv_connector": True}, "these layers use CPU_ATTN"),
        ({"head_size": 512}, "these layers use CPU_ATTN"),
    ],
)
def test_a_fallback_that_does_not_help_is_not_sold(
    changes: dict, either: str | None, vllm_log: list[str]
) -> None:
    choose("BMC", **changes)
    lines = [line for line in vllm_log if "attention backend BMC" in line]
    assert len(lines) == (either is not None)
    assert either is None or lines[0].endswith(either)


@pytest.mark.parametrize(
    ("flag", "feature"),
    [
        ("use_mm_prefix", "bidirectional attention over multimodal prefixes"),
        ("use_batch_invariant", "VLLM_BATCH_INVARIANT"),
        ("use_rswa", "reference sliding window attention"),
    ],
)
def test_what_neither_backend_does_is_no_reason_to_leave(
    flag: str, feature: str, vllm_log: list[str]
) -> None:
    assert choose("BMC", **{flag: True}) == BMC_CLASS
    (line,) = [line for line in vllm_log if "attention backend BMC" in line]
    assert line == (
        f"neither attention backend BMC nor CPU_ATTN implements {feature}: "
        "these layers use BMC, without it"
    )


def test_what_only_the_other_backend_does_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, vllm_log: list[str]
) -> None:
    monkeypatch.setattr(CPUAttentionBackend, "supports_mm_prefix", classmethod(lambda cls: True))
    assert choose("BMC", use_mm_prefix=True) == CPU_CLASS
    (line,) = [line for line in vllm_log if "attention backend BMC" in line]
    assert line.endswith("multimodal prefixes: these layers use CPU_ATTN")


@pytest.mark.parametrize(
    ("name", "default", "value", "taken"),
    [
        ("use_novelty", False, True, False),
        ("use_novelty", False, False, True),
        ("novelties", None, 3, False),
        ("novelties", None, None, True),
    ],
)
def test_an_unknown_property_of_a_layer_falls_back(
    name: str, default: object, value: object, taken: bool, vllm_log: list[str]
) -> None:
    """What a later vLLM might ask for, and this version of ours has never heard of."""
    fields = (*AttentionSelectorConfig._fields, name)
    defaults = (*AttentionSelectorConfig._field_defaults.values(), default)
    later = namedtuple("LaterSelectorConfig", fields, defaults=defaults)
    layer = later(**selector()._asdict(), **{name: value})
    chosen = current_platform.get_attn_backend_cls(AttentionBackendEnum["BMC"], layer)
    assert chosen == (BMC_CLASS if taken else CPU_CLASS)
    lines = [line for line in vllm_log if "attention backend BMC" in line]
    assert [f"does not support {name}={value!r}: these" in line for line in lines] == (
        [] if taken else [True]
    )


def test_kv_cache_dtype_that_is_the_models() -> None:
    assert choose("BMC", kv_cache_dtype="bfloat16") == BMC_CLASS


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_kv_caches(kv_cache_dtype: str, dtype: torch.dtype) -> None:
    assert choose("BMC", kv_cache_dtype=kv_cache_dtype, dtype=dtype) == BMC_CLASS


def config_of(model: str, **settings: object):
    return EngineArgs(
        model=model, skip_tokenizer_init=True, max_model_len=256, **settings
    ).create_engine_config()


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_backend": "BMC"},
        {"attention_backend": "bmc"},
        {"attention_config": {"backend": "BMC"}},
    ],
)
def test_ways_to_select(model_dir: ModelStore, settings: dict) -> None:
    config = config_of(model_dir("llama-gqa"), **settings)
    assert config.attention_config.backend.name == "BMC"
    assert config.cache_config.block_size == 32
    assert config.parallel_config.worker_cls == "bmc_vllm.worker.BMCWorker"
    assert config.scheduler_config.scheduler_cls == "bmc_vllm.scheduler.BMCScheduler"


def test_other_selections_stay_stock(model_dir: ModelStore) -> None:
    for settings in ({}, {"attention_backend": "CPU_ATTN"}):
        config = config_of(model_dir("llama-gqa"), **settings)
        assert config.cache_config.block_size == 128
        assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
        assert config.scheduler_config.scheduler_cls is None


def test_given_block_size_is_kept(model_dir: ModelStore) -> None:
    config = config_of(model_dir("llama-gqa"), attention_backend="BMC", block_size=64)
    assert config.cache_config.block_size == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"additional_config": {"bmc": {"r": 100}}}, r"'r'\]=100.*block size \(32\)"),
        ({"additional_config": {"bmc": {"r": 0}}}, r"'r'\]=0.*positive"),
        ({"additional_config": {"bmc": {"rr": 1}}}, "unknown keys rr; allowed: r"),
        ({"additional_config": {"bmc": {"r": 32}}, "block_size": 64}, r"block size \(64\)"),
        ({"block_size": 24}, "block_size=24.*multiples of 16"),
        (
            {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
            "kv_cache_dtype='bfloat16' with dtype float32: .* takes auto, fp8, fp8_e4m3, fp8_e5m2",
        ),
        (
            {"kv_cache_dtype": "int8_per_token_head", "dtype": "bfloat16"},
            "kv_cache_dtype='int8_per_token_head' with dtype bfloat16: .* takes auto, bfloat16, fp",
        ),
        (
            {"diffusion_config": {"canvas_length": 16}},
            "attention_backend='BMC' for a diffusion model.* allowed: attention_backend='CPU_ATTN'",
        ),
    ],
)
def test_refused_at_start(model_dir: ModelStore, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(model_dir("llama-gqa"), attention_backend="BMC", **settings)


def test_a_head_size_of_512_falls_back(model_dir: ModelStore, vllm_log: list[str]) -> None:
    """The whole model runs on the stock backend, block by block, and says so."""
    with engine(model_dir("llama-head512"), "BMC") as llm:
        names = {
            layer.attn_backend.get_name()
            for layer in worker(llm).compilation_config.static_forward_context.values()
        }
        assert names == {"CPU_ATTN"}
        managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
        assert [type(m).__name__ for m in managers] == ["FullAttentionManager"]
        assert len(generate(llm, prompts_of([20]), max_tokens=4)[0]) == 4
    (start,) = [line for line in vllm_log if line.startswith("BMC: attention backend")]
    assert "BMC for 0 of 2 layers, CPU_ATTN for 2 (BMC lacks head size 512)" in start
    assert "0 of 1 KV cache groups in chunks, 1 block by block (full attention)" in start
