"""vLLM's scheduler over a pool of blocks, without a model.

Promises the real Scheduler and block managers, configured as `vllm serve` configures them, with or
without BMC. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.lib.served import Served
from benchmarks.pool.cases import System
from bmc_vllm.kv_cache_interface import to_bmc_spec

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 8192,
    "vocab_size": 512,
    "torch_dtype": "bfloat16",
}


def configuration(
    system: System, requests: int, max_rows: int, num_blocks: int, caching: bool
) -> VllmConfig:
    """As of `vllm serve`, for a model of which nothing but the configuration exists."""
    with tempfile.TemporaryDirectory(prefix="bmc-benchmarks-") as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        bmc: dict[str, Any] = {}
        if system.r is not None:
            bmc = {"attention_backend": "BMC", "additional_config": {"bmc": {"r": system.r}}}
        return EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            max_model_len=max_rows,
            max_num_seqs=requests,
            max_num_batched_tokens=max(2048, max_rows),
            block_size=system.block_size,
            num_gpu_blocks_override=num_blocks,
            enable_prefix_caching=caching,
            **bmc,
        ).create_engine_config()


def served(system: System, requests: int, max_rows: int, num_blocks: int, caching: bool) -> Served:
    """A scheduler over a pool of its own, and nobody served yet."""
    config = configuration(system, requests, max_rows, num_blocks, caching)
    register_all_kvcache_specs(config)
    config.cache_config.num_gpu_blocks = num_blocks
    spec: Any = FullAttentionSpec(
        block_size=system.block_size, num_kv_heads=1, head_size=32, dtype=torch.bfloat16
    )
    group = KVCacheGroupSpec(["layer"], to_bmc_spec(spec) if system.r else spec)
    make: Any = config.scheduler_config.get_scheduler_cls()
    scheduler = make(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[group]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=system.block_size,
        log_stats=True,
    )
    init_none_hash(sha256)
    hasher = get_request_block_hasher(system.block_size, sha256) if caching else None
    return Served(scheduler, hasher)
