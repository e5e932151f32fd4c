"""Which draft tokens of a batch are worth verifying: the best set by expected tokens per second.

A pair (request, position) is a draft token. Verifying it yields one more token with the probability
that it and all before it are accepted, its survival, and costs a row of the batch and a query row
of its request. A step yields a token of each request in any case.

Promises the best set there is where attention costs rise ever faster (or evenly) with the query
rows of a request; else one close to it. Knows no time: the same arguments give the same set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bmc_core.speculation.costs import CostTables, Floats, StepCosts

Ints = NDArray[np.int64]

_TIE = 1e-9
"""Rates this close are the same: the shorter drafts win."""
_INSTANT = 1e-30
"""Seconds that stand for none, so that a rate exists."""


@dataclass(frozen=True)
class Choice:
    """Draft tokens for one step.

    Args:
        lengths: draft tokens to verify, by request.
        draft_steps: steps that the drafter runs for them.
        tokens: expected of the step, all requests together.
        seconds: expected of the step, drafting included.
    """

    lengths: tuple[int, ...]
    draft_steps: int
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Expected tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0.0 else math.inf


class Batch(NamedTuple):
    """The requests of a step, n of them.

    Attributes:
        survival: [n, positions], probabilities that fall along a row.
        contexts, limits: [n], as in `choose_lengths`.
        paid: [n], whether drafting for the request takes draft steps.
    """

    survival: Floats
    contexts: Floats
    limits: Ints
    paid: NDArray[np.bool_]


class BestSet(NamedTuple):
    """`Choice` in numbers for the controller; `plain_rate`: tokens per second without drafts."""

    lengths: Ints
    draft_steps: int
    tokens: float
    seconds: float
    plain_rate: float

    @property
    def rate(self) -> float:
        return self.tokens / max(self.seconds, _INSTANT)

    @property
    def gain(self) -> float:
        """Tokens per second over those of a step without drafts."""
        return self.rate / self.plain_rate


class _Rounds(NamedTuple):
    """The draft steps to choose among, rising, and the seconds of each."""

    steps: Ints
    seconds: Floats


def choose_lengths(
    survival: Sequence[Sequence[float]],
    contexts: Sequence[int],
    limits: Sequence[int],
    costs: StepCosts,
    *,
    draft_steps: int | None,
) -> Choice:
    """The best draft lengths of one step. No drafts at all is always among the candidates; of
    equally good sets the shorter wins.

    Args:
        survival: for each request and position, the probability that the draft token there and all
            before it are accepted. Positions beyond a row's end are never accepted.
        contexts: rows that each request's queries attend to.
        limits: most draft tokens of each request.
        draft_steps: steps that the drafter has run already: no draft is longer, and their seconds
            are part of the step whatever is chosen. None: they are still to be chosen.
    """
    if not survival:
        return Choice((), draft_steps or 0, 0.0, 0.0)
    positions = max(map(len, survival))
    if draft_steps is not None:
        positions = max(positions, draft_steps)
    padded = np.zeros((len(survival), positions))
    for row, chances in zip(padded, survival, strict=True):
        row[: len(chances)] = chances
    tables = CostTables(costs, positions)
    tables.reserve(len(survival) * (positions + 1))
    bounds = np.array(
        [max(0, min(n, len(row))) for n, row in zip(limits, survival, strict=True)], dtype=np.int64
    )
    batch = Batch(
        padded,
        np.array(contexts, dtype=np.float64),
        bounds,
        np.full(len(survival), bool(costs.draft) or draft_steps is not None),
    )
    best = best_set(batch, tables, draft_steps, passes=16)
    return Choice(tuple(best.lengths.tolist()), best.draft_steps, best.tokens, best.seconds)


def best_set(
    batch: Batch, tables: CostTables, draft_steps: int | None, *, passes: int = 2
) -> BestSet:
    """`choose_lengths` on arrays, with tables that reach n * (positions + 1) rows.

    Pairs are ordered by what each adds at the best rate known, survival - rate * its attention, and
    for every number of draft steps the best prefix is taken; with the better rate that it gives
    they are ordered again, until nothing improves (Dinkelbach's method) or for `passes`.
    """
    requests = len(batch.contexts)
    rounds = _rounds(batch, tables, draft_steps)
    attention = tables.attention[0] * batch.contexts.sum()
    plain = tables.factor[requests] * (tables.rows[requests] + attention)
    plain += tables.sampling[requests]
    paid = draft_steps or 0
    seconds = float(plain + (rounds.seconds[0] if draft_steps is not None else 0.0))
    plain_rate = requests / max(seconds, _INSTANT)
    best = BestSet(np.zeros(requests, np.int64), paid, float(requests), seconds, plain_rate)
    rate = plain_rate
    for _ in range(passes):
        found = _best_prefix(batch, tables, rounds, rate)
        if found is None or found.tokens <= rate * found.seconds * (1 + _TIE):
            break
        best = found._replace(plain_rate=plain_rate)
        rate = best.rate
        if requests == 1:
            break
    if draft_steps is not None:
        return best._replace(draft_steps=draft_steps)
    longest = int(best.lengths[batch.paid].max(initial=0))
    return best._replace(draft_steps=longest)


def worthwhile(batch: Batch, tables: CostTables, best: BestSet) -> Ints:
    """[n]: draft tokens that each request alone should add to the step of `best`."""
    worth = _worth(batch, tables, best.rate)
    rows = len(batch.contexts) + int(best.lengths.sum())
    linear = tables.rows * tables.factor + tables.sampling
    price = best.rate * max(0.0, float(linear[rows + 1] - linear[rows]))
    return np.count_nonzero(worth > price, axis=1)


def _rounds(batch: Batch, tables: CostTables, draft_steps: int | None) -> _Rounds:
    """What the drafter may run: all there is, or what it has run, or nothing where it is free."""
    drafting = tables.drafting(int(batch.paid.sum()), float(batch.contexts[batch.paid].sum()))
    if draft_steps is not None:
        return _Rounds(np.array([draft_steps]), drafting[draft_steps : draft_steps + 1])
    if not batch.paid.any():
        return _Rounds(np.array([0]), np.zeros(1))
    most = int(batch.limits[batch.paid].max())
    return _Rounds(np.arange(most + 1), drafting[: most + 1])


def _best_prefix(batch: Batch, tables: CostTables, rounds: _Rounds, rate: float) -> BestSet | None:
    """The best of all prefixes of the pairs in order, for every number of draft steps."""
    requests, positions = batch.survival.shape
    order = _ordered_pairs(batch, tables, rate)
    if not len(order):
        return None
    request, position = np.divmod(order, positions)
    chance = batch.survival.ravel()[order]
    attention = batch.contexts[request] * tables.attention_steps[position]
    taken = position < rounds.steps[:, None]
    if not batch.paid.all():
        taken |= ~batch.paid[request]
    tokens = requests + np.cumsum(chance * taken, axis=1)
    rows = requests + np.cumsum(taken, axis=1)
    forward = np.cumsum(attention * taken, axis=1)
    forward += tables.rows[rows] + tables.attention[0] * batch.contexts.sum()
    seconds = forward * tables.factor[rows] + tables.sampling[rows] + rounds.seconds[:, None]
    rates = tokens / np.maximum(seconds, _INSTANT)
    place = int(np.argmax(rates >= rates.max() * (1 - _TIE)))
    step, end = divmod(place, len(order))
    lengths = np.bincount(request[: end + 1][taken[step, : end + 1]], minlength=requests)
    return BestSet(
        lengths,
        int(rounds.steps[step]),
        float(tokens[step, end]),
        float(seconds[step, end]),
        rate,
    )


def _ordered_pairs(batch: Batch, tables: CostTables, rate: float) -> Ints:
    """Pairs, as indices into the flat survival, by falling worth at `rate`; a request's positions
    in their order. Those that cannot pay for their row are left out."""
    requests = len(batch.contexts)
    worth = _worth(batch, tables, rate).ravel()
    most = requests + int(batch.limits.sum())
    linear = tables.rows[requests : most + 1] * tables.factor[requests : most + 1]
    linear = linear + tables.sampling[requests : most + 1]
    least_row = max(0.0, float(np.diff(linear).min(initial=np.inf)))
    useful = np.flatnonzero(worth > rate * least_row)
    return useful[np.argsort(-worth[useful], kind="stable")]


def _worth(batch: Batch, tables: CostTables, rate: float) -> Floats:
    """[n, positions]: tokens that a pair adds less those that the time of its attention would have
    brought at `rate`; not rising along a row. -inf beyond a request's limit."""
    requests, positions = batch.survival.shape
    attention = batch.contexts[:, None] * tables.attention_steps
    worth = batch.survival - rate * tables.factor[requests] * attention
    worth[np.arange(positions) >= batch.limits[:, None]] = -np.inf
    return np.minimum.accumulate(worth, axis=1)
