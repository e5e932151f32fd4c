"""Which draft tokens of a batch are worth verifying: the best set by expected tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bmc_core.speculation.costs import StepCosts, at


@dataclass(frozen=True)
class Choice:
    """Draft tokens for one step.

    Args:
        lengths: draft tokens to verify, by request.
        draft_steps: steps that the drafter runs for them.
        tokens: expected of the step, all requests together.
        seconds: expected of the step.
    """

    lengths: tuple[int, ...]
    draft_steps: int
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / self.seconds


def choose_lengths(
    survival: Sequence[Sequence[float]],
    contexts: Sequence[int],
    limits: Sequence[int],
    costs: StepCosts,
    *,
    draft_steps: int | None,
) -> Choice:
    """The best draft lengths of one step.

    Args:
        survival: for each request and position, the probability that the draft token there and all
            before it are accepted.
        contexts: rows that each request's queries attend to.
        limits: most draft tokens of each request.
        draft_steps: steps that the drafter has run already, so that drafting costs nothing more;
            None: they are still to be run and are part of the price.
    """
    most = max(map(len, survival), default=0) if draft_steps is None else draft_steps
    lengths = tuple(
        min(len(chances), limit, most) for chances, limit in zip(survival, limits, strict=True)
    )
    tokens = sum(1 + sum(s[:n]) for s, n in zip(survival, lengths, strict=True))
    rows = sum(lengths) + len(lengths)
    seconds = at(costs.forward, rows) + at(costs.sampler, rows)
    seconds += sum(
        at(costs.attention, n + 1) * rows for n, rows in zip(lengths, contexts, strict=True)
    )
    return Choice(lengths, max(lengths, default=0), tokens, seconds)
