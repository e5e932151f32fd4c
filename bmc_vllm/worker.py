"""vLLM's CPU worker with a KV pool that is resident only where it is used.

Promises that model execution is vLLM's. Its hooks:

- ``_maybe_get_memory_pool_context``: vLLM's own place for a worker to bring its allocator for the
  KV cache; gives the pool's mapping instead of zeros that are written;
- ``initialize_from_config``: learns the pool's layout, then logs the one line that says what runs;
- ``execute_model``: releases the memory of blocks that the scheduler names, before the step;
- both report the pool's memory for ``/metrics``;
- ``reload_weights``, ``finish_weight_update``: hand new weights to the layers that keep a copy.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from bmc_core import native
from bmc_vllm.attention import BMCAttentionImpl
from bmc_vllm.config import BMCConfig
from bmc_vllm.cores import idle_core_warning
from bmc_vllm.layout import lost_layout
from bmc_vllm.memory import KVPoolMemory
from bmc_vllm.metrics import StatsWriter
from bmc_vllm.scheduler import RELEASED_BLOCKS

logger = logging.getLogger("vllm.bmc")

MEASURE_SHARE = 200
"""Residency is measured at most so often that it takes 1/200 of the time..."""
MEASURE_SECONDS = 2.0
"""...and at most every two seconds."""


class BMCWorker(CPUWorker):
    """See the module docstring."""

    _memory: KVPoolMemory | None = None
    _stats: StatsWriter | None = None
    _next_measure = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = BMCConfig.from_vllm_config(self.vllm_config)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        if tag == "kv_cache":
            self._memory = KVPoolMemory(huge_pages=not self._settings.release_free_memory)
            return self._memory.allocation()
        return super()._maybe_get_memory_pool_context(tag)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self._stats = StatsWriter(self.parallel_config.data_parallel_index)
        if self._memory is not None:
            self._memory.set_layout(kv_cache_config)
            if not self._memory.num_bytes and kv_cache_config.kv_cache_tensors:
                logger.warning(
                    "BMC: the KV pool was not allocated in the expected way; "
                    "all of it is resident from the start"
                )
        self._report_memory()
        if self.is_driver_worker:
            self._log_start()
            self._log_unusual()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        released = getattr(scheduler_output, RELEASED_BLOCKS, None)
        if released and self._memory is not None:
            self._memory.release(released)
            self._next_measure = 0.0
        output = super().execute_model(scheduler_output)
        # A step without tokens is the last one before the engine goes idle.
        idle = scheduler_output.total_num_scheduled_tokens == 0
        if idle or time.monotonic() >= self._next_measure:
            self._report_memory()
        return output

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        super().reload_weights(*args, **kwargs)
        self._renew_layers()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._renew_layers()

    def _renew_layers(self) -> None:
        # vLLM tells layers of new weights only where it read them from a checkpoint.
        for layer in self.compilation_config.static_forward_context.values():
            impl = getattr(layer, "impl", None)
            if isinstance(impl, BMCAttentionImpl):
                impl.copy_weights()

    def _report_memory(self) -> None:
        if self._memory is None or self._stats is None:
            return
        start = time.monotonic()
        resident = self._memory.resident_bytes()
        self._stats.write_memory(self.local_rank, self._memory.num_bytes, resident)
        end = time.monotonic()
        self._next_measure = end + max(MEASURE_SECONDS, MEASURE_SHARE * (end - start))

    def _log_start(self) -> None:
        block_size = self.cache_config.block_size
        threads = torch.get_num_threads()
        logger.info(
            "BMC: attention backend BMC, instruction set %s, dtype %s, r=%d rows, block size %d "
            "rows, %d threads",
            native.isa(),
            str(self.model_config.dtype).removeprefix("torch."),
            self._settings.rows(block_size),
            block_size,
            threads,
        )
        warning = idle_core_warning(threads, self.parallel_config.local_world_size, os.getppid())
        if warning:
            logger.warning("BMC: %s", warning)

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
