"""Draft lengths over the steps of a serving loop: asks the estimates, learns from what happened.

A step goes so: `draft_steps` says how many steps the drafter runs, `verified_lengths` how many of
the drafts are verified next, `observe_acceptance` what became of them and `observe_step` what it
took. `forget` ends a request. Promises that no length exceeds a request's limit or what is at hand,
and the same lengths for the same calls. Knows no framework; not safe for threads.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bmc_core.speculation.acceptance import Acceptance
from bmc_core.speculation.correction import CostCorrection
from bmc_core.speculation.costs import RULE_OF_THUMB, CostTables, StepCosts, StepTimes
from bmc_core.speculation.lengths import Batch, BestSet, Ints, best_set, worthwhile
from bmc_core.speculation.parking import (
    FIRST_STEPS,
    GAIN_SHARE,
    PROBE_SHARE,
    PROBE_TOKENS,
    PROBE_WEIGHT,
    PROBED_REQUESTS,
    DrafterRest,
    RequestProbes,
)

FEW_REQUESTS = 16
LONGEST_PLAN = 16
"""With more requests a plan serves several steps, one in (requests / `FEW_REQUESTS`)^2 is made: no
request weighs much then, and planning would."""
RESUME_GAIN = 0.02
"""A parked drafter must promise so much more to run again, and within `RESUME_STEPS` more than the
rows cost that it has to catch up on."""
RESUME_STEPS = 64
PARK_LOSS = 0.02
"""A drafter runs on where that is expected to cost no more, as parking it has its price too."""
PACE_TOKENS = 4
"""Draft tokens that say how fast a request goes. A token counts for the less the faster its request
is, by the root: a fast one ends soon whatever is done, and then the others are left alone."""
FIRST_PLAIN_STEPS, MOST_PLAIN_STEPS = 24, 1024
"""Between two steps that are kept free of drafts to learn what they take."""
CORRECT_STEPS = 16
"""The clock is heeded at each of the first steps, then every so many."""


@dataclass(frozen=True)
class DraftRequest:
    """One request of the next step.

    Args:
        context_rows: rows that its queries attend to.
        limit: most draft tokens that it may verify in the next step: spare rows, tokens left, the
            user's table by batch size. At least 0.
        drafter: which drafter makes them; requests of one drafter share a prior.
    """

    request_id: Hashable
    context_rows: int
    limit: int
    drafter: str = ""


@dataclass
class _Plan:
    """Lengths by request and drafter, for steps before `until` with drafts of up to `draft_steps`.
    `gain`: of tokens per second over no drafts; `pays`: enough for a parked drafter to run."""

    requests: int = 0
    made: int = 0
    until: int = 0
    draft_steps: int = 0
    gain: float = 1.0
    pays: bool = False
    lengths: dict[tuple[Hashable, str], int] = field(default_factory=dict)


class SpeculationController:
    """Chooses draft lengths for each request and step.

    Args:
        costs: None: not known yet, a rule of thumb stands in, with a scale from `observe_step`.
        max_draft_tokens: no request ever verifies more.
        fixed_length: every request takes `max_draft_tokens`, bound by its limit only.
        free_drafters: names of drafters that take no draft steps. All are, where `costs.draft` is
            empty.

    Attributes:
        chosen: how often each length was verified: index k counts requests with k draft tokens.
        parked_steps: steps for which the drafter was not asked although a request had room.
        probes: how often a parked request or drafter was asked again.

    Raises:
        ValueError: a negative `max_draft_tokens`.
    """

    def __init__(
        self,
        costs: StepCosts | None,
        *,
        max_draft_tokens: int,
        fixed_length: bool = False,
        free_drafters: Collection[str] = ("ngram", "suffix", "prompt_lookup"),
    ) -> None:
        if max_draft_tokens < 0:
            raise ValueError(f"max_draft_tokens={max_draft_tokens}: expected an int >= 0")
        self.max_draft_tokens = max_draft_tokens
        self.fixed_length = fixed_length
        self.chosen = [0] * (max_draft_tokens + 1)
        self.parked_steps = 0
        self.probes = 0
        self._free_drafters = frozenset(free_drafters)
        self._acceptance = Acceptance(max_draft_tokens)
        self._request_probes = RequestProbes()
        self._rest = DrafterRest()
        self._probes: set[Hashable] = set()
        self._ahead = _Plan()
        self._drafted = _Plan()
        self._now = 0
        self._counted = False
        self._last_steps = 0
        self._catches_up = False
        self._plain_due, self._plain_gap = FIRST_PLAIN_STEPS, FIRST_PLAIN_STEPS
        self._plain_at = -1
        self.set_costs(RULE_OF_THUMB if costs is None else costs)

    def set_costs(self, costs: StepCosts) -> None:
        """What steps cost, from a calibration; corrected from here on by `observe_step`."""
        self._costs = costs
        self._tables = CostTables(costs, self.max_draft_tokens)
        self._correction = CostCorrection()
        self._ahead.until = self._drafted.until = 0

    def draft_steps(self, requests: Sequence[DraftRequest]) -> int:
        """K: steps that the drafter should run for the next verification. 0 parks it. Where
        drafting is free it is always the maximum; `verified_lengths` chooses then."""
        self._now += 1
        self._counted = True
        steps = self._draft_steps(requests)
        if steps:
            self._catches_up = not self._last_steps
            self._rest.ran = self._now
        self._last_steps = steps
        return steps

    def _draft_steps(self, requests: Sequence[DraftRequest]) -> int:
        if self._rest.parked and self._sleeps(len(requests)):
            self._rest.earn(PROBE_SHARE)
            self.parked_steps += 1
            return 0
        if not self.fixed_length and all(map(self._drafts_free, requests)):
            return self.max_draft_tokens if requests else 0
        most = min(self.max_draft_tokens, max((request.limit for request in requests), default=0))
        if self.fixed_length or most <= 0:
            return max(0, most)
        self._rest.earn(PROBE_SHARE)
        if self._rest.parked:
            return self._parked_draft_steps(requests)
        if self._now >= self._ahead.until:
            self._ahead = self._plan_ahead(requests)
        if not self._ahead.draft_steps:
            self._ahead.until = 0
            self._rest.park(self._now)
            self.parked_steps += 1
            return 0
        self._rest.earn(GAIN_SHARE * (self._ahead.gain - 1))
        return 0 if self._wants_plain() else min(most, self._ahead.draft_steps)

    def _sleeps(self, requests: int) -> bool:
        """Whether a parked drafter has no reason to be thought of."""
        plan = self._ahead
        return (
            requests == plan.requests
            and self._now < plan.made + FIRST_STEPS
            and not self._acceptance.pending
            and not self._rest.due(self._now)
        )

    def _parked_draft_steps(self, requests: Sequence[DraftRequest]) -> int:
        """Of a parked drafter: 0, unless it would pay now, or its probe is due."""
        now = self._now
        plan = self._ahead = self._plan_ahead(requests)
        if plan.pays:
            self._rest.wake(now)
            return plan.draft_steps
        if self._rest.due(now):
            # Who has room may have another drafter.
            able = [r for r in requests if r.limit > 0 and not self._drafts_free(r)]
            if able and self._rest.pay(self._probe_price(requests), now):
                return self._probe_drafter(able)
            self._rest.postpone(now)
        self.parked_steps += 1
        return 0

    def verified_lengths(
        self, requests: Sequence[DraftRequest], available: Sequence[int]
    ) -> list[int]:
        """How many of the draft tokens at hand each request verifies; drafting them is paid.

        Args:
            available: draft tokens at hand, by request.
        """
        if not self._counted:
            self._now += 1
        self._counted = False
        lengths = [0] * len(requests)
        if any(available):
            most = self.max_draft_tokens
            limits = [
                max(0, min(count, request.limit, most))
                for request, count in zip(requests, available, strict=True)
            ]
            if self.fixed_length:
                lengths = limits
            elif any(limits):
                lengths = self._chosen_lengths(requests, limits)
        for length in lengths:
            self.chosen[length] += 1
        return lengths

    def _chosen_lengths(self, requests: Sequence[DraftRequest], limits: list[int]) -> list[int]:
        plan, longest = self._ahead, max(limits)
        if self._now >= plan.until or longest > plan.draft_steps:
            plan = self._drafted
            if self._now >= plan.until or longest > plan.draft_steps:
                plan = self._drafted = self._plan_drafted(requests, limits)
        probes, self._probes = self._probes, set()
        if self._plain_at == self._now or (plan.lengths and self._wants_plain()):
            return [0] * len(requests)
        if not (plan.lengths or probes):
            return [0] * len(requests)
        wanted = plan.lengths
        lengths = [wanted.get((r.request_id, r.drafter), 0) for r in requests]
        if probes:
            for place, request in enumerate(requests):
                if request.request_id in probes:
                    lengths[place] = max(lengths[place], PROBE_TOKENS)
        return list(map(min, lengths, limits))

    def observe_acceptance(
        self, request_id: Hashable, proposed: int, accepted: int, drafter: str = ""
    ) -> None:
        """A request's first `accepted` of `proposed` verified draft tokens were right."""
        if proposed > 0 and not self.fixed_length:
            proposed = min(proposed, self.max_draft_tokens)
            self._acceptance.observe(request_id, proposed, min(accepted, proposed), drafter)

    def observe_step(
        self, lengths: Sequence[int], contexts: Sequence[int], times: StepTimes
    ) -> None:
        """What a step without prefill rows took.

        Args:
            lengths: draft tokens verified, by request. contexts: rows attended to, by request.
        """
        if not lengths or self.fixed_length:
            return
        most = self.max_draft_tokens
        if max(lengths) > most:
            lengths = [min(length, most) for length in lengths]
        rows = sum(lengths) + len(lengths)
        measured = times.forward
        tables, correction = self._tables, self._correction
        self._reserve(rows)
        if self._costs.sampler:
            correction.sampling(times.sampling, tables.base_sampling[rows])
        else:
            measured += times.sampling
        correction.forward(rows, measured, tables.forward_seconds(lengths, contexts))
        if rows == len(lengths):
            self._plain_due = self._now + self._plain_gap
        if times.draft_steps > 0 and times.drafting > 0.0:
            if not self._catches_up:
                steps = min(times.draft_steps, self.max_draft_tokens)
                predicted = tables.drafting(len(lengths), sum(contexts))[steps]
                correction.drafting(times.drafting, predicted / tables.draft_factor)
            self._catches_up = False
        if correction.steps <= CORRECT_STEPS or correction.steps % CORRECT_STEPS == 0:
            self._correct()

    def forget(self, request_id: Hashable) -> None:
        """A request has ended."""
        self._acceptance.forget(request_id)

    def _drafts_free(self, request: DraftRequest) -> bool:
        return not self._costs.draft or request.drafter in self._free_drafters

    def _plan_ahead(self, requests: Sequence[DraftRequest]) -> _Plan:
        """The best draft steps and lengths as far as is known, drafting included."""
        slots = self._learn(requests)
        batch = self._batch(requests, [request.limit for request in requests], slots)
        best = best_set(batch, self._tables, None)
        if not self._rest.parked and not best.draft_steps and batch.limits.any():
            least = best_set(batch, self._tables, 1)
            if least.rate >= best.rate * (1 - PARK_LOSS):
                best = least
        plan = self._plan_of(requests, best, best.lengths)
        plan.gain = best.gain
        plan.pays = self._rest.parked and self._pays(requests, best)
        if best.draft_steps:
            # Only drafts that take draft steps are there for sure when they are to be verified.
            self._probe_requests(requests, plan, batch.paid & (batch.limits > 0), best, slots)
        return plan

    def _plan_drafted(self, requests: Sequence[DraftRequest], limits: Sequence[int]) -> _Plan:
        """The best lengths of drafts at hand: drafting them is paid."""
        slots = self._learn(requests)
        batch = self._batch(requests, limits, slots)
        longest = int(batch.limits[batch.paid].max(initial=0))
        best = best_set(batch, self._tables, longest)
        lengths = best.lengths
        lasts = len(requests) >= 2 * FEW_REQUESTS
        if lasts and not batch.limits.all():
            # The plan serves later steps too, in which others have drafts.
            bounds = np.clip([r.limit for r in requests], 0, self.max_draft_tokens)
            bounds = np.minimum(bounds, self._acceptance.reach(slots))
            wanted = worthwhile(batch._replace(limits=bounds), self._tables, best)
            lengths = np.where(batch.limits > 0, lengths, wanted)
        plan = self._plan_of(requests, best, lengths)
        plan.draft_steps = self.max_draft_tokens if lasts else max(limits)
        self._probe_requests(requests, plan, batch.limits > 0, best, slots)
        return plan

    def _plan_of(self, requests: Sequence[DraftRequest], best: BestSet, lengths: Ints) -> _Plan:
        lasts = min(LONGEST_PLAN, max(1, (len(requests) // FEW_REQUESTS) ** 2))
        plan = _Plan(len(requests), self._now, self._now + lasts, best.draft_steps)
        for request, length in zip(requests, lengths.tolist(), strict=True):
            if length:
                plan.lengths[request.request_id, request.drafter] = length
        return plan

    def _learn(self, requests: Sequence[DraftRequest]) -> Ints:
        """Takes in what was accepted; the slots of the requests."""
        rewarded = self._acceptance.learn()
        if len(rewarded):
            self._request_probes.rewarded(rewarded, self._now)
            names = {self._acceptance.drafter(slot) for slot in rewarded.tolist()}
            if not names <= self._free_drafters:
                self._rest.rewarded(self._now)
        return self._slots(requests)

    def _batch(self, requests: Sequence[DraftRequest], limits: Sequence[int], slots: Ints) -> Batch:
        self._reserve(len(requests) * (self.max_draft_tokens + 1))
        survival = self._acceptance.survival(slots)
        pace = 1 / np.sqrt(1 + survival[:, :PACE_TOKENS].sum(axis=1))
        return Batch(
            survival * (pace / pace.mean())[:, None],
            np.array([request.context_rows for request in requests], dtype=np.float64),
            np.clip(limits, 0, np.minimum(self._acceptance.reach(slots), self.max_draft_tokens)),
            np.array([not self._drafts_free(request) for request in requests]),
        )

    def _probe_requests(
        self,
        requests: Sequence[DraftRequest],
        plan: _Plan,
        able: NDArray[np.bool_],
        best: BestSet,
        slots: Ints,
    ) -> None:
        """Adds drafts of parked requests that are due, among those that are able to."""
        active = best.lengths > 0
        self._request_probes.verified(slots[active], self._now)
        idle = np.flatnonzero(able & ~active)
        if not len(idle):
            return
        self._acceptance.fade(slots[idle], plan.until - plan.made)
        taken = idle[self._request_probes.take(slots[idle], self._now)]
        if not len(taken):
            return
        self._acceptance.cap(slots[taken], PROBE_WEIGHT)
        self.probes += len(taken)
        self._probes.update(requests[place].request_id for place in taken.tolist())

    def _pays(self, requests: Sequence[DraftRequest], best: BestSet) -> bool:
        """Whether what a parked drafter promises is worth the rows that it missed."""
        gain = best.gain - 1
        if not best.draft_steps or gain < RESUME_GAIN:
            return False
        missed = self._tables.catching_up(self._missed_rows(requests))
        return gain * RESUME_STEPS * len(requests) / best.plain_rate >= missed

    def _probe_price(self, requests: Sequence[DraftRequest]) -> float:
        """Of a probe of the drafter with all that it entails, in steps without drafts."""
        tables, count = self._tables, len(requests)
        context = sum(request.context_rows for request in requests)
        seconds = tables.factor * tables.rows
        plain = seconds[count] + tables.factor[count] * tables.attention[0] * context
        probe = seconds[count + min(count, PROBED_REQUESTS)] - seconds[count]
        probe += tables.drafting(count, context)[min(PROBE_TOKENS, self.max_draft_tokens)]
        probe += tables.catching_up(self._missed_rows(requests))
        return float(probe / max(plain, 1e-30))

    def _missed_rows(self, requests: Sequence[DraftRequest]) -> int:
        """Rows that a draft model must take in before it drafts again, all requests together."""
        since = self._request_probes.since[self._slots(requests)]
        return int((self._now - np.maximum(since, self._rest.ran)).sum())

    def _probe_drafter(self, able: Sequence[DraftRequest]) -> int:
        start = self.probes * PROBED_REQUESTS % len(able)
        probed = [*able, *able][start : start + min(PROBED_REQUESTS, len(able))]
        self._probes.update(request.request_id for request in probed)
        self._acceptance.cap_drafters(PROBE_WEIGHT)
        self._acceptance.cap(self._slots(probed), PROBE_WEIGHT)
        self._rest.probe(self._now)
        self.probes += 1
        return PROBE_TOKENS

    def _slots(self, requests: Iterable[DraftRequest]) -> Ints:
        slots = []
        for request in requests:
            slot, new = self._acceptance.slot(request.request_id, request.drafter)
            if new:
                self._request_probes.admit(slot, self._now)
            slots.append(slot)
        return np.array(slots, dtype=np.int64)

    def _wants_plain(self) -> bool:
        """Whether this step goes without drafts, to learn what such a step takes: where all steps
        have drafts the clock could not tell that they do not pay."""
        if self._now < self._plain_due or not self._correction.steps:
            return False
        self._plain_gap = min(4 * self._plain_gap, MOST_PLAIN_STEPS)
        self._plain_due = self._now + self._plain_gap
        self._plain_at = self._now
        return True

    def _reserve(self, rows: int) -> None:
        if self._tables.reserve(rows):
            self._correct()

    def _correct(self) -> None:
        tables, correction = self._tables, self._correction
        tables.correct(
            correction.factors(len(tables.rows)),
            correction.sampling_factor,
            correction.draft_factor,
        )
