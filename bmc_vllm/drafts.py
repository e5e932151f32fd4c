"""How many draft tokens each request verifies, and how many the drafter makes, step by step.

Promises that draft tokens disturb nobody: they get rows that are spare (`spare_rows`) and tokens of
the step's budget that no request needs for tokens of its own, running or waiting; where the budget
binds there are none. Within these bounds `bmc_core.speculation` chooses by what pays, from what was
accepted and how long steps take. Everything is decided here, in the one scheduler, so that ranks
cannot differ.

Knows nothing of how drafts are made (`drafters`): the worker reads its steps from vLLM's
`num_spec_tokens_to_schedule`, and reports `STEP_TIMES`, `STEP_COSTS` and `DRAFTERS`.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from bmc_core.speculation import DraftRequest, SpeculationController
from bmc_vllm.drafters.clock import STEP_COSTS, STEP_TIMES
from bmc_vllm.drafters.drafting import DRAFTERS
from bmc_vllm.kv_cache_manager import GrowthState
from bmc_vllm.platform import WORKER_CLASS
from bmc_vllm.spare_rows import SpareRows, TakenBack
from bmc_vllm.speculative import STEPWISE, runs_step_by_step

TAKEN_BACK = "bmc_taken_back"
"""Attribute of a SchedulerOutput: `spare_rows.TakenBack`, for the worker's block tables."""


class DraftStats(NamedTuple):
    """Counters since the start.

    Attributes:
        rows_offered: spare rows that draft tokens could have had, summed over requests and steps.
        rows_used: rows that draft tokens were written to.
        growths: blocks that were taken for draft tokens before their request needed them.
        parked_steps: steps after which the drafter did not run, although requests had room.
        lengths: how often a request verified 0, 1, 2 ... draft tokens in a step.
    """

    rows_offered: int
    rows_used: int
    growths: int
    parked_steps: int
    lengths: tuple[int, ...]


class Drafts:
    """See the module docstring. One for a scheduler whose engine speculates.

    Attributes:
        controller: chooses the lengths.
        spare_rows: bounds them.
    """

    def __init__(
        self, scheduler: Scheduler, growth: GrowthState | None, fixed_length: bool
    ) -> None:
        config = scheduler.vllm_config
        speculative = config.speculative_config
        assert speculative is not None
        self._scheduler = scheduler
        self._max = scheduler.num_spec_tokens
        self._drafter = str(speculative.method)
        self._drafters: dict[str, str] = {}  # Of two, who made a request's last draft.
        self._has_rows = self._drafter in STEPWISE
        if self._has_rows:
            scheduler.num_lookahead_tokens = 0  # Their rows are found here.
        if scheduler.dynamic_sd_lookup is None:
            # Without a table vLLM pads new requests with dummy drafts, for the sake of CUDA graphs.
            scheduler.dynamic_sd_lookup = [self._max] * (scheduler.max_num_running_reqs + 1)
        parallel = config.parallel_config
        self._own_worker = parallel.worker_cls == WORKER_CLASS
        # Other ranks of data parallelism would have to run as many draft steps.
        self._steers_drafter = runs_step_by_step(speculative) and parallel.data_parallel_size == 1
        self._steps = self._max  # Of the drafter, after the last step.
        self._draft_slots = getattr(speculative, "max_num_new_slots_for_drafting", 0)
        draft = speculative.draft_model_config
        limit = None if draft is None else draft.max_model_len
        self._drafter_limit = scheduler.max_model_len if limit is None else limit
        self.controller = SpeculationController(
            None, max_draft_tokens=self._max, fixed_length=fixed_length
        )
        self.spare_rows = SpareRows(
            scheduler.kv_cache_manager.coordinator.single_type_managers,
            growth,
            may_grow=self._own_worker
            and parallel.pipeline_parallel_size == 1
            and scheduler.connector is None
            and not scheduler.use_v2_model_runner,
        )
        self._taken_back: TakenBack = {}
        # Of the step: by request, rows for drafts at hand, and blocks taken ahead.
        self._offered: dict[str, int] = {}
        self._growths: dict[str, int] = {}
        self._fillers = False
        self._rows_offered = self._num_growths = 0
        self._lengths = [0] * (self._max + 1)

    def stats(self) -> DraftStats:
        """The counters now."""
        used = sum(length * count for length, count in enumerate(self._lengths))
        return DraftStats(
            self._rows_offered,
            used,
            self._num_growths,
            self.controller.parked_steps,
            tuple(self._lengths),
        )

    # The steps of a step, in order.

    def before_schedule(self) -> None:
        """Cuts the draft tokens at hand to what the step has room for and what pays."""
        scheduler = self._scheduler
        self._growths.clear()
        self._offered.clear()
        self._taken_back = self.spare_rows.begin_step(
            scheduler.running,
            waits=scheduler.get_request_counts()[1] > 0,
            budget=scheduler.max_num_scheduled_tokens,
        )
        # What drafts were made for a prompt in parts vLLM has not taken over.
        requests = [r for r in scheduler.running if not r.is_prefill_chunk]
        at_hand = [len(request.spec_token_ids) for request in requests]
        # A draft model also wants rows to write to, for the drafts that it makes after the step.
        ahead = 1 + self._steps if self._has_rows and self._steps else 0
        if not ahead and not any(at_hand):
            return
        budget, most = self._spare_budget(), self._most()
        asked = [self._offer(request, budget, most, ahead) for request in requests]
        lengths = self.controller.verified_lengths(asked, at_hand) if any(at_hand) else at_hand
        for request, length in zip(requests, lengths, strict=True):
            length = max(0, min(length, budget))
            budget -= length
            request.spec_token_ids = request.spec_token_ids[:length]
            name, own = request.request_id, request.num_tokens
            if blocks := self.spare_rows.take(name, own, own + length + ahead):
                self._growths[name] = blocks

    def after_schedule(self, output: SchedulerOutput) -> None:
        """Tells the worker what was taken back, and how many steps the drafter is to run."""
        if self._taken_back:
            setattr(output, TAKEN_BACK, self._taken_back)
        if not output.num_scheduled_tokens:
            return
        self._count(output)
        requests = self._scheduler.requests
        longest = max(requests[name].num_computed_tokens for name in output.num_scheduled_tokens)
        # Then vLLM's runner does not draft, and gives every request K times the token 0; BMC's
        # worker drafts what fits.
        self._fillers = not self._own_worker and longest + self._max > self._drafter_limit
        if self._steers_drafter:
            # Prompts alone: the drafter reads them in any case.
            asked = self._next_requests(output)
            steps = self.controller.draft_steps(asked) if asked else 0
            output.num_spec_tokens_to_schedule = min(output.num_spec_tokens_to_schedule, steps)
        self._steps = output.num_spec_tokens_to_schedule

    def before_output(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        """Learns what the step cost, before requests are brought up to date."""
        costs = getattr(result, STEP_COSTS, None)
        if costs is not None:
            self.controller.set_costs(costs)
        times = getattr(result, STEP_TIMES, None)
        if times is None:
            return
        lengths, contexts = [], []
        for name, rows in output.num_scheduled_tokens.items():
            request = self._scheduler.requests.get(name)
            drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
            if request is None or rows != 1 + drafts:
                return  # It has ended meanwhile, or this is a prompt: the times say other things.
            lengths.append(drafts)
            contexts.append(request.num_computed_tokens - drafts)
        self.controller.observe_step(lengths, contexts, times)

    def observe_acceptance(
        self, request_id: str, proposed: int, accepted: int, invalid: dict[str, int] | None
    ) -> None:
        """What became of a request's draft tokens; ``invalid``: those that no grammar allowed."""
        proposed -= (invalid or {}).get(request_id, 0)
        if proposed > 0:
            drafter = self._drafter_of(request_id)
            self.controller.observe_acceptance(request_id, proposed, accepted, drafter)

    def before_drafts(self, drafts: DraftTokenIds) -> None:
        """Notes who made them; drops those of a step in which the drafter did not run."""
        if self._fillers:
            for tokens in drafts.draft_token_ids:
                tokens.clear()
        names = getattr(drafts, DRAFTERS, None)
        if names is not None:
            made = zip(drafts.req_ids, names, strict=True)
            # A request that ended with this step was forgotten already.
            self._drafters.update((r, name) for r, name in made if r in self._scheduler.requests)

    def forget(self, request_id: str) -> None:
        """The request ends, or is preempted."""
        self.controller.forget(request_id)
        self._drafters.pop(request_id, None)
        self.spare_rows.forget(request_id)

    def _drafter_of(self, request_id: str) -> str:
        return self._drafters.get(request_id, self._drafter)

    # What bounds the drafts.

    def _most(self) -> int:
        """Of the user's table by batch size."""
        lookup = self._scheduler.dynamic_sd_lookup
        assert lookup is not None
        return min(self._max, lookup[min(max(1, len(self._scheduler.running)), len(lookup) - 1)])

    def _spare_budget(self) -> int:
        """Tokens of the next step that no request has a use for; negative where they do not
        suffice for all."""
        scheduler = self._scheduler
        running = scheduler.running
        needed = sum(max(1, r.num_tokens - r.num_computed_tokens) for r in running)
        slots = len(running)
        room = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
        if slots + scheduler.num_waiting_for_streaming_input < room:
            holding: Any = getattr(scheduler, "kv_holding_waiting", ())
            for request in chain(holding, scheduler.waiting):
                needed += max(1, request.num_tokens - request.num_computed_tokens)
                slots += 1
                if needed > scheduler.max_num_scheduled_tokens:
                    break
        inputs = scheduler.scheduler_config.max_num_batched_tokens - slots * self._draft_slots
        return min(scheduler.max_num_scheduled_tokens, inputs) - needed

    def _offer(self, request: Request, budget: int, most: int, ahead: int) -> DraftRequest:
        """How many of its draft tokens a request may verify in this step, `most` of them.

        Args:
            ahead: rows that it wants behind them.
        """
        name, own = request.request_id, request.num_tokens
        useful = self._useful(request, own)
        limit = min(len(request.spec_token_ids), most, useful)
        if budget <= 0:
            limit = 0
        elif limit + ahead:
            wanted = own + min(limit + ahead, useful)
            limit = min(limit, self.spare_rows.rows(name, own, wanted, claim=True) - own)
        self._offered[name] = limit
        return DraftRequest(name, own, limit, self._drafter_of(name))

    def _next_requests(self, output: SchedulerOutput) -> list[DraftRequest]:
        """The requests that could verify draft tokens in the step after this."""
        budget, most = self._spare_budget(), self._most()
        found = []
        for name in output.num_scheduled_tokens:
            request = self._scheduler.requests[name]
            if request.is_prefill_chunk:
                continue
            own = request.num_tokens + 1
            limit = max(0, min(most, self._useful(request, own), budget))
            if limit:
                spare = self.spare_rows.rows(name, own, own + limit) - own
                # Tokens of this step that are accepted may bring it into the next block.
                if spare >= len(output.scheduled_spec_decode_tokens.get(name, ())):
                    limit = spare
            found.append(DraftRequest(name, own, limit, self._drafter_of(name)))
        return found

    def _useful(self, request: Request, num_tokens: int) -> int:
        """Draft tokens behind so many tokens that a request could still accept."""
        left = request.num_prompt_tokens + request.max_tokens - num_tokens
        return max(0, min(left, self._scheduler.max_model_len - num_tokens) - 1)

    def _count(self, output: SchedulerOutput) -> None:
        for name, rows in output.num_scheduled_tokens.items():
            length = len(output.scheduled_spec_decode_tokens.get(name, ()))
            if rows == 1 + length:  # no prompt
                self._lengths[length] += 1
                self._rows_offered += self._offered.get(name, 0)
                self._num_growths += self._growths.get(name, 0)
