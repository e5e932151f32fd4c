"""vLLM's CPU worker with a KV pool of its own memory.

Promises that model execution is vLLM's, and that a step waits for no figures. Five hooks:

- ``_maybe_get_memory_pool_context``: vLLM's own place for a worker to bring its allocator for the
  KV cache; gives the pool's mapping instead of zeros that are written;
- ``initialize_from_config``: learns the pool's size and layout, logs what is in memory and the one
  line that says what runs, and starts to report the pool's memory for ``/metrics``;
- ``execute_model``: before the step, releases the memory of blocks that the scheduler names, and
  shortens the block tables from which it took blocks back;
- ``sample_tokens``: keeps requests with a ``seed`` and a prompt in parts from ending the engine;
- ``compile_or_warm_up_model``: measures what a step of speculative decoding costs.

With speculative decoding the model runner's drafter is steered and timed (`drafters`).
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from bmc_core import native
from bmc_core.machine import openmp
from bmc_vllm.config import AUTO, BMCConfig
from bmc_vllm.drafters.calibration import in_words, measured_costs
from bmc_vllm.drafters.clock import StepClock
from bmc_vllm.drafters.drafting import Drafting
from bmc_vllm.drafts import TAKEN_BACK
from bmc_vllm.generators import only_for_kept_tokens
from bmc_vllm.layout import lost_layout
from bmc_vllm.memory import KVPoolMemory, gib
from bmc_vllm.metrics import StatsWriter
from bmc_vllm.platform import BACKEND_NAME, SCHEDULER_CLASS
from bmc_vllm.residency import ResidencyMeter
from bmc_vllm.scheduler import RELEASED_BLOCKS
from bmc_vllm.spare_rows import shorten_tables
from bmc_vllm.speculative import check_draft_layers
from bmc_vllm.startup import attention_layers, groups_in_words, layers_in_words

logger = logging.getLogger("vllm.bmc")


class BMCWorker(CPUWorker):
    """See the module docstring."""

    _memory: KVPoolMemory | None = None
    _residency: ResidencyMeter | None = None
    _clock: StepClock | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = BMCConfig.from_vllm_config(self.vllm_config)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        if tag == "kv_cache" and self._memory is not None:
            return self._memory.allocation()
        return super()._maybe_get_memory_pool_context(tag)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        if kv_cache_config.kv_cache_tensors:
            self._memory = KVPoolMemory(
                kv_cache_config.kv_cache_tensors[0].size,
                shared=self._settings.release_free_memory,
            )
        if self._steers_drafts:
            check_draft_layers(self.model_runner, kv_cache_config)
        start = time.monotonic()
        super().initialize_from_config(kv_cache_config)
        if self._steers_drafts:
            self._clock = StepClock(Drafting(self.model_runner, self._settings))
        if self._memory is not None:
            if self._memory.mapped:
                self._start_pool(self._memory, kv_cache_config, time.monotonic() - start)
            else:
                logger.warning(
                    "BMC: the KV pool was not allocated in the expected way: it is vLLM's own, and "
                    "its memory is neither measured nor released"
                )
                self._memory = None
        if self.is_driver_worker:
            self._log_start(kv_cache_config)
            self._log_unusual()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        if self._memory is not None:
            released = getattr(scheduler_output, RELEASED_BLOCKS, None)
            if released:
                self._memory.release(released)
        taken_back = getattr(scheduler_output, TAKEN_BACK, None)
        if taken_back:
            shorten_tables(self.model_runner, taken_back)
        output = super().execute_model(scheduler_output)
        if self._residency is not None:
            self._residency.changed()
        return output

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        if self.use_v2_model_runner:  # draws by seed and position, and has no generators
            return super().sample_tokens(grammar_output)
        with only_for_kept_tokens(self.model_runner):
            return super().sample_tokens(grammar_output)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        times = super().compile_or_warm_up_model()
        # With a fixed number of draft tokens nobody asks what they cost.
        if self._clock is not None and self._settings.draft_length == AUTO:
            self._clock.costs = measured_costs(self.model_runner)
            if self._clock.costs is not None and self.is_driver_worker:
                logger.info("BMC: speculation: %s", in_words(self._clock.costs))
        return times

    @property
    def _steers_drafts(self) -> bool:
        return self.vllm_config.speculative_config is not None and not self.use_v2_model_runner

    def _start_pool(self, memory: KVPoolMemory, config: KVCacheConfig, seconds: float) -> None:
        memory.set_layout(config)
        num_bytes, resident = memory.num_bytes, memory.resident_bytes()
        logger.info(
            "BMC: KV pool: %s reserved, %s of it in memory after %.1f s%s",
            gib(num_bytes),
            gib(resident),
            seconds,
            " (release_free_memory: others may take what is not in use)" if memory.shared else "",
        )
        stats = StatsWriter(self.vllm_config)
        stats.write_memory(num_bytes, resident)
        self._residency = ResidencyMeter(
            memory, lambda resident: stats.write_memory(num_bytes, resident)
        )

    def _log_start(self, kv_cache_config: KVCacheConfig) -> None:
        block_size = self.cache_config.block_size
        ours = self.vllm_config.scheduler_config.scheduler_cls == SCHEDULER_CLASS
        # The scheduler measures "auto" when the workers are ready, and has a line of its own.
        auto = self._settings.r == AUTO
        rows = (AUTO if auto else self._settings.rows(block_size)) if ours else None
        layers = attention_layers(self.vllm_config.compilation_config.static_forward_context)
        logger.log(
            logging.INFO if BACKEND_NAME in layers else logging.WARNING,
            "BMC: %s; %s; instruction set %s, dtype %s, block size %d rows, %d threads of %s",
            layers_in_words(layers),
            groups_in_words(kv_cache_config.kv_cache_groups, rows),
            native.isa(),
            str(self.model_config.dtype).removeprefix("torch."),
            block_size,
            torch.get_num_threads(),
            openmp.serving() or "an unknown OpenMP runtime",
        )

    def _log_unusual(self) -> None:
        """What differs from the engine that is tested and measured."""
        loss = lost_layout(self.vllm_config)
        if loss is not None:
            logger.warning("BMC: %s", loss)
        if self.use_v2_model_runner:
            logger.warning(
                "BMC: vLLM's second model runner has not been tested with attention backend BMC; "
                "VLLM_USE_V2_MODEL_RUNNER=0 selects the first, which has been"
            )
