"""Draft lengths over the steps of a serving loop: asks the estimates, learns from what happened."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from bmc_core.speculation.costs import StepCosts, StepTimes


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


class SpeculationController:
    """Chooses draft lengths for each request and step. Deterministic; not safe for threads.

    Args:
        costs: None: not known yet; `set_costs` gives them, or they are learned from `StepTimes`.
        max_draft_tokens: no request ever verifies more.
        fixed_length: every request takes `max_draft_tokens`, bound by its limit only.

    Attributes:
        chosen: how often each length was verified: index k counts requests with k draft tokens.
        parked_steps: steps for which the drafter was not asked although a request had room.
        probes: steps in which a parked request or drafter was asked again.
    """

    def __init__(
        self, costs: StepCosts | None, *, max_draft_tokens: int, fixed_length: bool = False
    ) -> None:
        if max_draft_tokens < 0:
            raise ValueError(f"max_draft_tokens={max_draft_tokens}: expected an int >= 0")
        self.max_draft_tokens = max_draft_tokens
        self.fixed_length = fixed_length
        self.chosen = [0] * (max_draft_tokens + 1)
        self.parked_steps = 0
        self.probes = 0
        self._costs = costs

    def set_costs(self, costs: StepCosts) -> None:
        """What steps cost, from a calibration; corrected from here on by `observe_step`."""
        self._costs = costs

    def draft_steps(self, requests: Sequence[DraftRequest]) -> int:
        """K: steps that the drafter should run for the next verification. 0 parks it."""
        most = max((request.limit for request in requests), default=0)
        return max(0, min(self.max_draft_tokens, most))

    def verified_lengths(
        self, requests: Sequence[DraftRequest], available: Sequence[int]
    ) -> list[int]:
        """How many of the draft tokens at hand each request verifies; drafting them is paid.

        Args:
            available: draft tokens at hand, by request.
        """
        lengths = [
            max(0, min(count, request.limit, self.max_draft_tokens))
            for request, count in zip(requests, available, strict=True)
        ]
        for length in lengths:
            self.chosen[length] += 1
        return lengths

    def observe_acceptance(
        self, request_id: Hashable, proposed: int, accepted: int, drafter: str = ""
    ) -> None:
        """A request's first `accepted` of `proposed` verified draft tokens were right."""

    def observe_step(
        self, lengths: Sequence[int], contexts: Sequence[int], times: StepTimes
    ) -> None:
        """What a step without prefill rows took.

        Args:
            lengths: draft tokens verified, by request. contexts: rows attended to, by request.
        """

    def forget(self, request_id: Hashable) -> None:
        """A request has ended."""
