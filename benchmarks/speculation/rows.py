"""A system with a draft length on a case, and what its turns say.

Knows nothing of how turns come about.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.engines.speculating.base import AUTO, NONE, Contender, Length, Turn
from benchmarks.lib.timing import Timing, summary
from benchmarks.speculation.cases import Case

Turns = Mapping[tuple[str, Length], Sequence[Turn]]


class Row(NamedTuple):
    """One system with one draft length on one case. NaN: there is nothing to tell.

    Attributes:
        length: draft tokens of a step, or how they are chosen.
        openmp: runtime that serves parallel regions.
        timing: milliseconds per token, of all requests together.
        acceptance: share of draft tokens right, of those up to the first wrong one.
        matched: share of a request's steps that had draft tokens.
        mean_length: draft tokens verified by a request in a step.
        tokens_per_step: of a request.
        draft_cost: of one step of the drafter, over the same system's step without speculation.
        forward_ms: of the target's forward in a step.
        bound: what tokens a step over the cost of the forward leave of speedup over none: all that
            sampling, drafting and scheduling then take away.
        over_none: tokens per second over the same system's without speculation.
        agreement: share of tokens, up to each request's first difference, that are the reference's.
    """

    case: Case
    system: str
    title: str
    peer: bool
    length: Length
    threads: int
    openmp: str
    timing: Timing
    acceptance: float
    matched: float
    mean_length: float
    tokens_per_step: float
    draft_cost: float
    forward_ms: float
    bound: float
    over_none: float
    agreement: float

    @property
    def tokens_per_second(self) -> float:
        return 1e3 / self.timing.ms

    @property
    def fixed(self) -> bool:
        """Whether it has the same length in every step; none at all counts."""
        return isinstance(self.length, int) or self.length == NONE


def rows_of(
    case: Case,
    contenders: Sequence[Contender],
    turns: Turns,
    reference: Sequence[Sequence[int]],
) -> list[Row]:
    """Of every contender.

    Args:
        reference: of each prompt, the tokens that all should have.
    """
    timings = {
        key: summary([one.seconds / one.tokens for one in found]) for key, found in turns.items()
    }
    rows = []
    for one in contenders:
        found, none = turns[one.key], turns.get((one.speculator.name, NONE), ())
        step = _mean(t.seconds / t.steps for t in none)
        tokens_per_step = _mean(t.tokens / t.steps / case.batch for t in found)
        forward = _mean(t.forward_seconds / t.steps for t in found)
        cost = forward / _mean(t.forward_seconds / t.steps for t in none)
        rows.append(
            Row(
                case,
                one.speculator.name,
                one.speculator.title,
                one.speculator.peer,
                one.length,
                one.speculator.threads,
                one.speculator.openmp,
                timings[one.key],
                _share(found, "accepted", "examined"),
                _share(found, "drafted_for", "steps") / case.batch,
                _share(found, "proposed", "steps") / case.batch,
                tokens_per_step,
                _share(found, "drafting_seconds", "draft_steps") / step,
                forward * 1e3,
                tokens_per_step / cost,
                timings[one.speculator.name, NONE].ms / timings[one.key].ms if none else math.nan,
                agreement(found[-1].outputs, reference),
            )
        )
    return rows


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else math.nan


def _share(turns: Sequence[Turn], part: str, whole: str) -> float:
    total = sum(getattr(turn, whole) for turn in turns)
    return sum(getattr(turn, part) for turn in turns) / total if total else math.nan


def agreement(outputs: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Share of the tokens before each request's first difference."""
    same = total = 0
    for ours, theirs in zip(outputs, reference, strict=True):
        total += len(theirs)
        pairs = zip(ours, theirs, strict=False)
        same += next((place for place, (a, b) in enumerate(pairs) if a != b), len(theirs))
    return same / total if total else 1.0


def best_fixed(rows: Sequence[Row]) -> Row | None:
    """The fastest of those with one length in every step, none included; in hindsight."""
    return max(
        (row for row in rows if row.fixed), key=lambda row: row.tokens_per_second, default=None
    )


def best_own(rows: Sequence[Row]) -> Row | None:
    """The fastest with draft tokens: a framework's own way, or its best fixed length."""
    own = [row for row in rows if row.length not in (NONE, AUTO)]
    return max(own, key=lambda row: row.tokens_per_second, default=None)
