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
from bmc_vllm.kv_cache_interface import is_bmc_spec

logger = logging.getLogger("vllm.bmc")

SECONDS = 2.0


def measured_r(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Rows per growth; 128 where nothing grows, or, with a line that says why, can be measured."""
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    found = [spec for spec in specs if isinstance(spec, AttentionSpec) and is_bmc_spec(spec)]
    if not found:
        return DEFAULT_R  # Nothing grows by r rows, as the line at the start has said.
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
            'BMC: r="auto" is %d rows: no piece was read nearly as fast as one stretch (%d rows '
            "took %.0f%% longer), as where others use the machine at the start",
            DEFAULT_R,
            r,
            100 * loss,
        )
        return DEFAULT_R
    logger.info(
        'BMC: r="auto" is %d rows: attention over such pieces takes %.0f%% longer than over one '
        "stretch",
        r,
        max(0.0, 100 * loss),
    )
    return r
