"""vLLM's scheduler with BMC's block managers switched on.

Promises that scheduling itself is vLLM's. The hooks:

- ``__init__`` gives the managers their ``r`` and the requests, which vLLM does not hand to them;
- ``schedule`` attaches the blocks whose memory may be released to the step's output: to a step
  with tokens no more than goes unnoticed, all that are left to the one before the engine idles;
- ``reset_prefix_cache`` releases the memory of all free blocks;
- ``make_stats``, which vLLM calls once per step, exports the counters now and then, where vLLM
  exports its own;
- with speculation, each place where draft tokens come by tells `drafts`, which cuts them to the
  spare rows: ``schedule``, ``update_from_output``, ``make_spec_decoding_stats``,
  ``update_draft_token_ids``, ``_preempt_request`` and ``_free_request``.

Knows nothing of memory pages: the worker releases them, before it runs the step.
"""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from bmc_vllm.auto_r import measured_r
from bmc_vllm.config import AUTO, FIXED, BMCConfig
from bmc_vllm.drafts import Drafts
from bmc_vllm.integrity import check_integrity
from bmc_vllm.kv_cache_manager import GrowthStats, configure_growth
from bmc_vllm.memory import release_bounds
from bmc_vllm.metrics import StatsWriter

RELEASED_BLOCKS = "bmc_released_blocks"
"""Attribute of a SchedulerOutput: runs of ids of blocks whose memory the worker may release."""
STATS_SECONDS = 0.5
"""The counters, some of which visit every request, are exported at most so often."""


class BMCScheduler(Scheduler):
    """See the module docstring.

    Attributes:
        growth: what the managers share; None where no manager grows by chunks.
        drafts: bounds and chooses draft tokens; None without speculation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = BMCConfig.from_vllm_config(self.vllm_config)
        if config.r == AUTO:
            r = measured_r(self.vllm_config, self.kv_cache_config)
        else:
            r = config.rows(self.vllm_config.cache_config.block_size)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.growth = configure_growth(managers, r, self.requests)
        self._release_bounds = release_bounds(self.kv_cache_config)
        if self.growth is not None and config.release_free_memory:
            self.growth.queue.remember_discarded()
        self.drafts: Drafts | None = None
        if self.vllm_config.speculative_config is not None and self.num_spec_tokens:
            self.drafts = Drafts(self, self.growth, config.draft_length == FIXED)
        self._stats: StatsWriter | None = None
        self._next_stats = 0.0
        if self.log_stats:
            self._stats = StatsWriter(self.vllm_config)
            self._write_stats(self._stats)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.drafts is not None:
            self.drafts.before_schedule()
        output = super().schedule(*args, **kwargs)
        if self.drafts is not None:
            self.drafts.after_schedule(output)
        if self.growth is None:
            return output
        bounds = self._release_bounds if output.total_num_scheduled_tokens else ()
        released = self.growth.queue.take_discarded(*bounds)
        if released:
            # Workers handle steps in order: whoever gets these blocks next writes to them
            # in a later step than this one, and earlier steps that read them are over.
            setattr(output, RELEASED_BLOCKS, released)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if self.drafts is not None:
            self.drafts.before_output(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        if self.drafts is not None:
            self.drafts.observe_acceptance(
                request_id, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens
            )
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        if self.drafts is not None:
            self.drafts.before_drafts(draft_token_ids)
        super().update_draft_token_ids(draft_token_ids)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        if self.drafts is not None:
            self.drafts.forget(request.request_id)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.drafts is not None:
            self.drafts.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        done = super().reset_prefix_cache(*args, **kwargs)
        if done and self.growth is not None:
            self.growth.queue.discard_all()
        return done

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        if self._stats is not None:
            # The last step before the engine idles counts, whenever it comes, and the first after.
            now, idles = time.monotonic(), not self.requests
            if now >= self._next_stats or idles:
                self._next_stats = 0.0 if idles else now + STATS_SECONDS
                self._write_stats(self._stats)
        return super().make_stats(*args, **kwargs)

    def _write_stats(self, writer: StatsWriter) -> None:
        writer.write_growth(self.growth_stats())
        if self.drafts is not None:
            writer.write_drafts(self.drafts.stats())

    def growth_stats(self) -> GrowthStats:
        """The growth counters now."""
        return self.growth.stats() if self.growth is not None else GrowthStats(0, 0, 0)

    def check_integrity(self) -> None:
        """Raises IntegrityError if the block pool and the block tables contradict each other."""
        retained = chain.from_iterable(blocks for _, blocks in self.deferred_frees)
        check_integrity(
            self.kv_cache_manager.block_pool,
            self.kv_cache_manager.coordinator.single_type_managers,
            retained,
        )
