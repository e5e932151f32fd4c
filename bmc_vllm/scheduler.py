"""vLLM's scheduler with BMC's block managers switched on.

Promises that scheduling itself is vLLM's. Three hooks:

- ``__init__`` gives the managers their policy and ``max_model_len``, which vLLM does not hand to
  them;
- ``schedule`` attaches the blocks whose memory may be released to the step's output;
- ``make_stats``, which vLLM calls once per step, also exports the growth counters.

Knows nothing of memory pages: the worker releases them, before it runs the step.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats

from bmc_vllm.block_runs import is_fresh
from bmc_vllm.config import BMCConfig
from bmc_vllm.integrity import check_integrity
from bmc_vllm.kv_cache_manager import GrowthStats, configure_growth
from bmc_vllm.metrics import StatsWriter

RELEASED_BLOCKS = "bmc_released_blocks"
"""Attribute of a SchedulerOutput: ids of blocks whose memory the worker may release."""


class BMCScheduler(Scheduler):
    """See the module docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = BMCConfig.from_vllm_config(self.vllm_config)
        self.growth = configure_growth(
            self.kv_cache_manager.coordinator.single_type_managers,
            config.policy(self.vllm_config.cache_config.block_size),
            self.vllm_config.model_config.max_model_len,
            track_touched=config.release_free_memory,
        )
        self._stats = StatsWriter(self.vllm_config.parallel_config.data_parallel_index)
        self._stats.reset_scheduler()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        if self.growth.touched:
            released = self._take_released_blocks()
            if released:
                # Workers handle steps in order: whoever gets these blocks next writes to them
                # in a later step than this one, and earlier steps that read them are over.
                setattr(output, RELEASED_BLOCKS, released)
        return output

    def _take_released_blocks(self) -> list[int]:
        pool = self.kv_cache_manager.block_pool
        touched = self.growth.touched
        assert touched is not None
        released = [i for i in touched if is_fresh(pool, pool.blocks[i])]
        touched.difference_update(released)
        return released

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        self._stats.write_growth(self.growth.stats())
        return super().make_stats(*args, **kwargs)

    def growth_stats(self) -> GrowthStats:
        """The growth counters now."""
        return self.growth.stats()

    def check_integrity(self) -> None:
        """Raises IntegrityError if the block pool and the block tables contradict each other."""
        retained = chain.from_iterable(blocks for _, blocks in self.deferred_frees)
        check_integrity(
            self.kv_cache_manager.block_pool,
            self.kv_cache_manager.coordinator.single_type_managers,
            retained,
        )
