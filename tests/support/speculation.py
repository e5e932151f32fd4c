"""A serving loop without a model: draft tokens are right by chance, steps take what costs say."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bmc_core.speculation import DraftRequest, StepCosts, StepTimes
from bmc_core.speculation.costs import CostTables, at

MOST = 8

COSTS = StepCosts(
    forward=(
        *((1, 20e-3), (5, 20e-3), (8, 20.5e-3), (12, 22e-3), (16, 25e-3)),
        *((24, 34e-3), (32, 42e-3), (40, 50e-3), (64, 74e-3), (72, 86e-3)),
    ),
    attention=((1, 1.0e-6), (5, 1.0e-6), (9, 1.2e-6), (17, 1.9e-6)),
    draft=((1, 2.0e-3), (8, 2.4e-3), (16, 3.0e-3), (64, 8.0e-3)),
    draft_attention=((1, 0.5e-7), (9, 0.6e-7)),
    sampler=((1, 0.1e-3), (64, 2e-3)),
    draft_overhead=0.3e-3,
)
"""A target of eight free rows, its heads not grouped, and a draft of a tenth."""

FREE = StepCosts(COSTS.forward, COSTS.attention, (), sampler=COSTS.sampler)


class Policy(Protocol):
    """What a `SpeculationController` answers."""

    def draft_steps(self, requests: Sequence[DraftRequest]) -> int: ...
    def verified_lengths(
        self, requests: Sequence[DraftRequest], available: Sequence[int]
    ) -> list[int]: ...
    def observe_acceptance(
        self, request_id: Hashable, proposed: int, accepted: int, drafter: str = ""
    ) -> None: ...
    def observe_step(
        self, lengths: Sequence[int], contexts: Sequence[int], times: StepTimes
    ) -> None: ...
    def forget(self, request_id: Hashable) -> None: ...


class Fixed:
    """Always k, and nothing learned."""

    def __init__(self, k: int) -> None:
        self.k = k

    def draft_steps(self, requests: Sequence[DraftRequest]) -> int:
        return min(self.k, max((request.limit for request in requests), default=0))

    def verified_lengths(
        self, requests: Sequence[DraftRequest], available: Sequence[int]
    ) -> list[int]:
        return [min(self.k, r.limit, n) for r, n in zip(requests, available, strict=True)]

    def observe_acceptance(self, *_: object) -> None: ...
    def observe_step(self, *_: object) -> None: ...
    def forget(self, *_: object) -> None: ...


@dataclass
class Stream:
    """One request: its draft token for place t is right, those before it being so, with
    probability `acceptance(t)`. The draws are the request's own, so that every policy meets the
    same ones. `matches(t)`: whether the drafter proposes anything at t."""

    name: Hashable
    tokens: int
    acceptance: Callable[[int], float]
    context: int = 1000
    matches: Callable[[int], bool] = lambda _: True
    drafter: str = ""
    done: int = 0
    missed: int = 0
    proposed: int = 0
    right: list[bool] = field(default_factory=list)

    def draw(self, seed: int) -> None:
        chance = random.Random(f"{seed} {self.name}")
        self.right = [
            chance.random() < self.acceptance(t) for t in range(self.tokens + 2 * MOST + 1)
        ]
        self.done = self.missed = self.proposed = 0

    def accepted(self, proposed: int) -> int:
        """Draft tokens that are right among the next ones."""
        count = 0
        while count < proposed and self.right[self.done + count]:
            count += 1
        return count


@dataclass
class Served:
    """What a run took, and the steps: (seconds, lengths, K)."""

    seconds: float = 0.0
    tokens: int = 0
    steps: list[tuple[float, list[int], int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def serve(
    policy: Policy,
    streams: Iterable[Stream],
    costs: StepCosts = COSTS,
    *,
    batch: int = 8,
    most: int = MOST,
    seed: int = 0,
    clock: Callable[[float], float] = lambda seconds: seconds,
    told: bool = True,
    until: float = math.inf,
) -> Served:
    """Serves all streams, at most `batch` at once, in vLLM's order of calls: a step's draft length
    is asked for before the acceptance of that step is known.

    Args:
        clock: what a policy is told of true seconds.
        told: whether it is told of seconds at all.
        until: seconds after which serving ends, whoever is left.
    """
    waiting, live, served = list(streams), [], Served()
    for stream in waiting:
        stream.draw(seed)
    tables = CostTables(costs, most)
    while (waiting or live) and served.seconds < until:
        while waiting and len(live) < batch:
            live.append(waiting.pop(0))
        requests = [
            DraftRequest(s.name, s.context + s.done, min(most, s.tokens - s.done - 1), s.drafter)
            for s in live
        ]
        lengths = policy.verified_lengths(requests, [s.proposed for s in live])
        steps = policy.draft_steps(requests)
        times = _times(costs, tables, lengths, live, steps)
        spent = times.forward + times.sampling + times.drafting
        served.seconds += spent
        served.steps.append((spent, lengths, steps))
        contexts = [request.context_rows for request in requests]
        for stream, length in zip(live, lengths, strict=True):
            accepted = stream.accepted(length)
            kept = min(accepted + 1, stream.tokens - stream.done)
            stream.done += kept
            served.tokens += kept
            stream.missed = stream.missed + kept if not steps else 0
            stream.proposed = min(steps, most) if stream.matches(stream.done) else 0
            if length:
                policy.observe_acceptance(stream.name, length, accepted, stream.drafter)
        if told:
            policy.observe_step(
                lengths,
                contexts,
                StepTimes(
                    clock(times.forward), clock(times.sampling), clock(times.drafting), steps
                ),
            )
        for stream in [s for s in live if s.done >= s.tokens]:
            live.remove(stream)
            policy.forget(stream.name)
    return served


def _times(
    costs: StepCosts, tables: CostTables, lengths: Sequence[int], live: list[Stream], steps: int
) -> StepTimes:
    contexts = [stream.context + stream.done for stream in live]
    rows = sum(lengths) + len(lengths)
    drafting = 0.0
    if steps and costs.draft:
        drafting = float(tables.drafting(len(live), sum(contexts))[steps])
        drafting += tables.catching_up(sum(stream.missed for stream in live))
    return StepTimes(
        tables.forward_seconds(lengths, contexts), at(costs.sampler, rows), drafting, steps
    )


def best_fixed(
    streams: Callable[[], Iterable[Stream]],
    costs: StepCosts = COSTS,
    *,
    batch: int = 8,
    most: int = MOST,
    seed: int = 0,
    lengths: Iterable[int] | None = None,
    until: float = math.inf,
) -> tuple[int, Served]:
    """The best fixed k in hindsight, no drafts included, and what it took."""
    runs = {
        k: serve(Fixed(k), streams(), costs, batch=batch, most=most, seed=seed, until=until)
        for k in (range(most + 1) if lengths is None else lengths)
    }
    best = max(runs, key=lambda k: runs[k].rate)
    return best, runs[best]
