"""The platform: vLLM's CPU platform with the attention backend ``BMC`` in it.

Promises: without BMC selected every answer is the base class's. The base class is the one that
vLLM itself would choose (zentorch's, where it would run). With BMC selected, a layer that the
kernel cannot do falls back to the base class's backend with one log line that names the feature.

Importing this module registers the backend's name; vLLM imports it in every process, before any
configuration is unpickled. Knows nothing of how attention is computed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from bmc_core.log import log_once
from bmc_vllm.config import BMCConfig
from bmc_vllm.plugin import builtin_platform
from bmc_vllm.vllm_0_31 import register_attention_backend

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = logging.getLogger("vllm.bmc")

BACKEND_NAME = "BMC"
BACKEND_CLASS = "bmc_vllm.attention.BMCAttentionBackend"
WORKER_CLASS = "bmc_vllm.worker.BMCWorker"
STOCK_WORKER_CLASS = "vllm.v1.worker.cpu_worker.CPUWorker"
SCHEDULER_CLASS = "bmc_vllm.scheduler.BMCScheduler"
DEFAULT_BLOCK_SIZE = 32
"""Rows per block when the user names none: the kernel has no reason for the stock 128, and the
prefix cache matches whole blocks."""

if BACKEND_NAME not in AttentionBackendEnum.__members__:
    register_attention_backend(BACKEND_NAME, BACKEND_CLASS)

_Base: Any = resolve_obj_by_qualname(builtin_platform() or "vllm.platforms.cpu.CpuPlatform")


def is_bmc(backend: Any) -> bool:
    """Whether ``backend`` (an AttentionBackendEnum member, a string or None) is ours."""
    return backend is not None and getattr(backend, "name", str(backend)).upper() == BACKEND_NAME


def selects_bmc(vllm_config: VllmConfig) -> bool:
    """Whether any layer of the model or of its draft model asks for BMC."""
    attention = vllm_config.attention_config
    if is_bmc(attention.backend):
        return True
    if any(is_bmc(backend) for backend in (attention.backend_per_kind or {}).values()):
        return True
    speculative = vllm_config.speculative_config
    return speculative is not None and is_bmc(getattr(speculative, "attention_backend", None))


def unsupported_feature(selector: AttentionSelectorConfig) -> str | None:
    """The feature of a layer that the kernel lacks, in the words of its setting; None if none."""
    from bmc_vllm.attention import FP8_KV_CACHE, BMCAttentionBackend

    dtype = str(selector.dtype).removeprefix("torch.")
    if selector.use_mla:
        return "multi-head latent attention (MLA)"
    if selector.use_sparse:
        return "sparse attention"
    if selector.attn_type != "decoder":
        return f"attention type {str(getattr(selector.attn_type, 'value', selector.attn_type))!r}"
    if selector.kv_cache_dtype not in (None, "auto", dtype, *FP8_KV_CACHE):
        return f"kv_cache_dtype={selector.kv_cache_dtype!r} with dtype {dtype}"
    if not BMCAttentionBackend.supports_dtype(selector.dtype):
        return f"dtype {dtype}"
    if not BMCAttentionBackend.supports_head_size(selector.head_size):
        return f"head size {selector.head_size}"
    for flag, feature in (
        ("use_mm_prefix", "bidirectional attention over multimodal prefixes"),
        ("use_per_head_quant_scales", "per-head quantization scales"),
        ("use_batch_invariant", "VLLM_BATCH_INVARIANT"),
        ("use_kv_connector", "a KV connector (kv_transfer_config)"),
        ("use_pcp", "prefill context parallelism"),
        ("use_dcp", "decode context parallelism"),
        ("use_adaptive_verification", "adaptive verification"),
        ("use_rswa", "reference sliding window attention"),
    ):
        if getattr(selector, flag):
            return feature
    return None


class BMCPlatform(_Base):  # type: ignore[misc]
    """See the module docstring."""

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: Any,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        """Class path of the layer's backend."""
        if not is_bmc(selected_backend):
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        feature = unsupported_feature(attn_selector_config)
        if feature is None:
            return BACKEND_CLASS
        # No selection: the base class then takes the backend that suits the layer.
        fallback = super().get_attn_backend_cls(None, attn_selector_config, num_heads)
        log_once(
            logger,
            f"attention backend BMC does not support {feature}: "
            f"these layers use {fallback.rsplit('.', 1)[-1]}",
        )
        return fallback

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """vLLM's hook for a platform to complete the configuration."""
        super().check_and_update_config(vllm_config)
        if selects_bmc(vllm_config):
            _apply_bmc(vllm_config)

    @classmethod
    def register_custom_kv_cache_specs(cls, vllm_config: VllmConfig) -> None:
        """Tells vLLM which manager hands out the blocks of our specs; unused specs cost nothing."""
        super().register_custom_kv_cache_specs(vllm_config)
        from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
        from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

        from bmc_vllm.kv_cache_interface import BMCFullAttentionSpec, BMCSlidingWindowSpec
        from bmc_vllm.kv_cache_manager import BMCFullAttentionManager, BMCSlidingWindowManager

        KVCacheSpecRegistry.register(
            BMCFullAttentionSpec,
            BMCFullAttentionManager,
            uniform_type_base_spec=FullAttentionSpec,
        )
        KVCacheSpecRegistry.register(
            BMCSlidingWindowSpec,
            BMCSlidingWindowManager,
            uniform_type_base_spec=SlidingWindowSpec,
        )


def _apply_bmc(vllm_config: VllmConfig) -> None:
    """Block size, worker and scheduler of a configuration that selects BMC; checks its settings."""
    from bmc_core.attention import BLOCK_ROWS

    cache = vllm_config.cache_config
    model = vllm_config.model_config
    hybrid = model is not None and (model.is_hybrid or model.use_mla)
    if not cache.user_specified_block_size and not hybrid:
        cache.block_size = DEFAULT_BLOCK_SIZE
        # vLLM calls this hook again for a draft model's configuration, which shares this object:
        # without the mark the base class would put its own default back.
        cache.user_specified_block_size = True
    if cache.block_size is not None and cache.block_size % BLOCK_ROWS:
        raise ValueError(
            f"block_size={cache.block_size}: attention backend BMC takes multiples of {BLOCK_ROWS}"
        )
    config = BMCConfig.from_vllm_config(vllm_config)
    if cache.block_size is not None:
        config.check_block_size(cache.block_size)

    parallel = vllm_config.parallel_config
    if parallel.worker_cls == STOCK_WORKER_CLASS:
        parallel.worker_cls = WORKER_CLASS
    elif parallel.worker_cls != WORKER_CLASS:
        log_once(
            logger,
            f"worker_cls={parallel.worker_cls!r} replaces BMC's worker: the KV pool is resident "
            "from the start",
        )
    scheduler = vllm_config.scheduler_config
    if getattr(vllm_config, "diffusion_config", None) is not None:
        log_once(logger, "diffusion models have their own scheduler: caches grow block by block")
    elif scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SCHEDULER_CLASS
    elif scheduler.scheduler_cls != SCHEDULER_CLASS:
        log_once(
            logger,
            f"scheduler_cls={scheduler.scheduler_cls!r} replaces BMC's scheduler: KV caches grow "
            "block by block",
        )
    speculative = vllm_config.speculative_config
    if speculative is None or model is not speculative.draft_model_config:
        # Not a configuration that vLLM derives for a draft model: that has no numbers of its own.
        from bmc_vllm import metrics

        metrics.publish(vllm_config)
