"""A vLLM scheduler that serves without a model: it is told that every token was sampled.

Promises that scheduling and block tables are vLLM's own; only the answers are drawn. Knows nothing
of where the scheduler comes from.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from benchmarks.lib.load import VOCABULARY, Load, Requests


class Served:
    """A scheduler and the requests that it serves.

    Args:
        scheduler: nobody else uses it meanwhile.
        hasher: of blocks, for prefix caching; None without.

    Attributes:
        seconds: of the last step's scheduling, the sampled tokens' bookkeeping included.
        ended: requests that ended in the last step.
        stats: what vLLM counted in it.
        preempted: requests preempted so far.
    """

    def __init__(self, scheduler: Scheduler, hasher: Callable[[Request], Any] | None) -> None:
        self.scheduler = scheduler
        self._hasher = hasher
        self._random = random.Random(0)
        self._count = 0
        self.seconds = 0.0
        self.ended: list[Request] = []
        self.stats: SchedulerStats | None = None
        self.preempted = 0

    def add(self, prompt: list[int], outputs: int) -> None:
        """A request that waits from now on, and gets `outputs` tokens."""
        parameters = SamplingParams(max_tokens=outputs, ignore_eos=True)
        parameters.update_from_generation_config({}, None)
        name = f"served-{self._count}"
        request = Request(name, prompt, parameters, None, block_hasher=self._hasher)
        self._count += 1
        self.scheduler.add_request(request)

    def step(self) -> SchedulerOutput:
        """Schedules a step, and answers it with a drawn token for every request that decodes."""
        scheduler = self.scheduler
        start = time.perf_counter()
        output = scheduler.schedule()
        scheduled = time.perf_counter()
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
        answered = time.perf_counter()
        outputs = scheduler.update_from_output(output, answer)
        self.seconds = scheduled - start + time.perf_counter() - answered
        self.stats = next((o.scheduler_stats for o in outputs.values()), None)
        self.ended = [r for name, r in running.items() if name not in scheduler.requests]
        self.preempted += len(output.preempted_req_ids or ())
        return output


def wear(served: Served, load: Load, turnovers: int) -> None:
    """Serves requests until `turnovers` times as many rows were computed as the pool has, and ends
    those that run then: every block is free, and the pool as after hours of service."""
    requests = Requests(load)
    scheduler = served.scheduler
    computed = 0
    while computed < turnovers * load.pool_rows:
        while len(scheduler.running) + len(scheduler.waiting) < load.requests:
            served.add(*requests.draw())
        computed += served.step().total_num_scheduled_tokens
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    scheduler.schedule()  # Workers need not hear of requests that they have never met.
