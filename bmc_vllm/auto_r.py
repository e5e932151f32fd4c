"""``"r": "auto"``: the smallest r whose pieces are read nearly as fast as one stretch.

Nothing is copied when a block table grows, so that the costs from which "auto" follows in Hugging
Face do not exist here. What r buys is that rows lie side by side; how much that is worth is
measured when the engine starts (`bmc_core.costs.pieces`), for the widest layer that grows.
"""

from __future__ import annotations

import logging

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig

from bmc_core.costs.pieces import TOLERANCE, piece_seconds, smallest_fast
from bmc_core.policy import DEFAULT_R

logger = logging.getLogger("vllm.bmc")

SECONDS = 2.0


def measured_r(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Rows per growth; 128, with a line that says why, where nothing can be measured."""
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    found = [spec for spec in specs if isinstance(spec, AttentionSpec)]
    if not found:
        return DEFAULT_R
    spec = max(found, key=lambda spec: spec.num_kv_heads * spec.head_size)
    heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
    dtype = spec.dtype
    if dtype.itemsize == 1:  # vLLM keeps fp8 rows as bytes
        dtype = torch.float8_e4m3fn
    try:
        seconds = piece_seconds(
            spec.num_kv_heads,
            spec.head_size,
            dtype,
            num_heads=max(heads, spec.num_kv_heads),
            seconds=SECONDS,
        )
    except (ValueError, TypeError, MemoryError, RuntimeError) as error:
        logger.warning('BMC: r="auto" is %d rows: nothing was measured: %s', DEFAULT_R, error)
        return DEFAULT_R
    r = smallest_fast(seconds)
    loss = seconds[r] / seconds[0] - 1
    if loss > TOLERANCE:
        logger.warning(
            'BMC: r="auto" is %d rows, the most it tries, which took %.0f%% longer than one '
            "stretch: a machine that is busy at the start cannot be measured; name r where that "
            "goes on",
            r,
            100 * loss,
        )
        return r
    logger.info(
        'BMC: r="auto" is %d rows: attention over such pieces takes %.0f%% longer than over one '
        "stretch",
        r,
        max(0.0, 100 * loss),
    )
    return r
