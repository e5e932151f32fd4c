"""vLLM's scheduler without a model: it schedules, and is told that every token was sampled.

Promises the real Scheduler and block managers, configured as `vllm serve` configures them, with or
without BMC; only the model's answers are drawn. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.pool.cases import VOCABULARY, System
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
    with tempfile.TemporaryDirectory() as folder:
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


class Served:
    """A scheduler and the requests that it serves.

    Attributes:
        scheduler: vLLM's, or BMC's.
        seconds: of the last step's scheduling, the sampled tokens' bookkeeping included.
        ended: requests that ended in the last step.
        stats: what vLLM counted in it.
        preempted: requests preempted so far.
    """

    def __init__(
        self, system: System, requests: int, max_rows: int, num_blocks: int, caching: bool
    ) -> None:
        config = configuration(system, requests, max_rows, num_blocks, caching)
        register_all_kvcache_specs(config)
        config.cache_config.num_gpu_blocks = num_blocks
        spec: Any = FullAttentionSpec(
            block_size=system.block_size, num_kv_heads=1, head_size=32, dtype=torch.bfloat16
        )
        make: Any = config.scheduler_config.get_scheduler_cls()
        self.scheduler: Scheduler = make(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[
                    KVCacheGroupSpec(["layer"], to_bmc_spec(spec) if system.r else spec)
                ],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=system.block_size,
            log_stats=True,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(system.block_size, sha256) if caching else None
        self._random = random.Random(0)
        self._count = 0
        self.seconds = 0.0
        self.ended: list[Request] = []
        self.stats: SchedulerStats | None = None
        self.preempted = 0

    def add(self, prompt: list[int], outputs: int) -> None:
        parameters = SamplingParams(max_tokens=outputs, ignore_eos=True)
        parameters.update_from_generation_config({}, None)
        request = Request(str(self._count), prompt, parameters, None, block_hasher=self._hasher)
        self._count += 1
        self.scheduler.add_request(request)

    def step(self) -> SchedulerOutput:
        """Schedules a step, and answers it with a drawn token for every request that decodes."""
        scheduler = self.scheduler
        start = time.perf_counter()
        output = scheduler.schedule()
        middle = time.perf_counter()
        ids = list(output.num_scheduled_tokens)
        running = {i: scheduler.requests[i] for i in ids}
        # What was scheduled counts as computed already.
        sampled = [
            [self._random.randrange(VOCABULARY)] if r.num_computed_tokens >= r.num_tokens else []
            for r in running.values()
        ]
        answer = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: place for place, name in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        again = time.perf_counter()
        outputs = scheduler.update_from_output(output, answer)
        self.seconds = middle - start + time.perf_counter() - again
        self.stats = next((o.scheduler_stats for o in outputs.values()), None)
        self.ended = [
            request for name, request in running.items() if name not in scheduler.requests
        ]
        self.preempted += len(output.preempted_req_ids or ())
        return output
