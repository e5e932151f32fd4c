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
from bmc_vllm.speculative import check as check_speculative
from bmc_vllm.vllm_0_31 import register_attention_backend

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig
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


FALLBACKS: dict[AttentionSelectorConfig, str] = {}
"""Layers of this process that asked for BMC and run on another backend, with what BMC lacks."""


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
        from bmc_vllm.selector import decide

        # No selection: the base class then takes the backend that suits the layer.
        path = super().get_attn_backend_cls(None, attn_selector_config, num_heads)
        fallback = resolve_obj_by_qualname(path)
        decision = decide(attn_selector_config, fallback)
        line = decision.line(fallback.get_name())
        if line is not None:
            log_once(logger, line)
        if not decision.lacks:
            return BACKEND_CLASS
        FALLBACKS[attn_selector_config] = ", ".join(decision.lacks)
        return path

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


def _check_kv_cache_dtype(kv_cache_dtype: str, dtype: Any) -> None:
    """Raises ValueError for a cache that neither BMC nor CPU_ATTN computes rightly."""
    from bmc_vllm.attention import FP8_KV_CACHE, PLAIN_KV_CACHE

    own = [name for name, plain in PLAIN_KV_CACHE.items() if plain == dtype]
    allowed = ["auto", *own, *FP8_KV_CACHE]
    if kv_cache_dtype not in allowed:
        raise ValueError(
            f"kv_cache_dtype={kv_cache_dtype!r} with dtype {str(dtype).removeprefix('torch.')}: "
            f"attention backend BMC takes {', '.join(allowed)}, and CPU_ATTN no others"
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
    if model is not None and not model.use_mla:
        _check_kv_cache_dtype(cache.cache_dtype, model.dtype)
    if getattr(vllm_config, "diffusion_config", None) is not None:
        raise ValueError(
            "attention_backend='BMC' for a diffusion model, whose requests are causal or not "
            "within one step: not supported; allowed: attention_backend='CPU_ATTN'"
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
            f"worker_cls={parallel.worker_cls!r} replaces BMC's worker: the KV pool is vLLM's own, "
            "and release_free_memory has no effect",
        )
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SCHEDULER_CLASS
    elif scheduler.scheduler_cls != SCHEDULER_CLASS:
        log_once(
            logger,
            f"scheduler_cls={scheduler.scheduler_cls!r} replaces BMC's scheduler: KV caches grow "
            "block by block",
        )
    check_speculative(vllm_config)
    speculative = vllm_config.speculative_config
    if speculative is not None and is_bmc(vllm_config.attention_config.backend):
        _hand_down_to_draft(speculative)
    # Methods without a draft model (n-gram) have the target's configuration in its place.
    if (
        speculative is None
        or model is not speculative.draft_model_config
        or model is speculative.target_model_config
    ):
        # Not a configuration that vLLM derives for a draft model: that has no numbers of its own.
        from bmc_vllm import metrics

        metrics.publish(vllm_config)


def _hand_down_to_draft(speculative: SpeculativeConfig) -> None:
    """A draft with attention layers runs on BMC as its target does, unless the user names another.

    vLLM hands no backend down. A draft on CPU_ATTN would cost the target its layout of the pool
    (`bmc_vllm.layout`), and could not read the rows of layers that it shares with the target.
    """
    has_attention = speculative.use_eagle() or speculative.uses_draft_model()
    if has_attention and speculative.attention_backend is None:
        speculative.attention_backend = AttentionBackendEnum[BACKEND_NAME]
        log_once(
            logger,
            f"speculative_config names no attention_backend: the layers of method "
            f"{speculative.method!r} run on BMC, as the target's do",
        )
