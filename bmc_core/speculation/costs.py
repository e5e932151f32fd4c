"""What one step of speculative decoding costs, as curves that a calibration measures.

Promises plain seconds: `StepCosts` holds the parts of a step, `CostTables` the same by whole rows,
for a choice that asks for many of them at once. Knows neither acceptance nor how the curves were
measured.
"""

from __future__ import annotations

import itertools
import math
import operator
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Curve = tuple[tuple[int, float], ...]
Floats = NDArray[np.float64]

_CURVES = ("forward", "attention", "draft", "draft_attention", "sampler")


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the parts of one step; curves of points (x, seconds), linear between and beyond
    them, and never negative.

    Args:
        forward: rows of the whole batch -> the target's forward, attention over the cache left out.
        attention: query rows of one request -> seconds per context row, all layers together.
        draft: requests -> one draft step, vocabulary head and overhead included. (): free, such as
            n-gram.
        draft_attention: query rows -> seconds per context row of the draft model, all its layers.
        sampler: rows sampled or verified -> seconds. (): part of `forward`.
        draft_overhead: seconds of a round of drafting beside its steps.

    Raises:
        ValueError: an empty `forward` or `attention`, a negative or infinite figure, or a curve
            whose x do not rise.
    """

    forward: Curve
    attention: Curve
    draft: Curve
    draft_attention: Curve = ()
    sampler: Curve = ()
    draft_overhead: float = 0.0

    def __post_init__(self) -> None:
        for name in _CURVES:
            points = getattr(self, name)
            if not points and name in ("forward", "attention"):
                raise ValueError(f"{name}=(): expected at least one point (x, seconds)")
            if not all(math.isfinite(x) and math.isfinite(y) and y >= 0 for x, y in points):
                raise ValueError(f"{name}={points}: expected finite points with seconds >= 0")
            if any(a[0] >= b[0] for a, b in itertools.pairwise(points)):
                raise ValueError(f"{name}={points}: expected rising x")
        if not (math.isfinite(self.draft_overhead) and self.draft_overhead >= 0):
            raise ValueError(f"draft_overhead={self.draft_overhead}: expected seconds >= 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepCosts:
        """What `to_dict` gave, also after a way through JSON.

        Raises:
            ValueError: as the constructor; a name that is unknown or missing.
        """
        known = {field.name for field in fields(cls)}
        for name in sorted(set(data) - known):
            raise ValueError(f"{name}: expected one of {', '.join(sorted(known))}")
        for name in ("forward", "attention", "draft"):
            if name not in data:
                raise ValueError(f"{name} is missing: expected points (x, seconds)")
        curves = {
            name: tuple((int(x), float(y)) for x, y in data[name])
            for name in _CURVES
            if name in data
        }
        return cls(**curves, draft_overhead=float(data.get("draft_overhead", 0.0)))


@dataclass(frozen=True)
class StepTimes:
    """What the clock says of one step without prefill rows.

    Args:
        forward: seconds of the target's forward, attention included.
        sampling: seconds of sampling and verification.
        drafting: seconds; 0.0 where the drafter did not run.
        draft_steps: K that the drafter ran.
    """

    forward: float
    sampling: float
    drafting: float
    draft_steps: int


RULE_OF_THUMB = StepCosts(
    forward=((1, 20e-3), (8, 20e-3), (16, 25e-3), (32, 42e-3), (64, 76e-3)),
    attention=((1, 0.0),),
    draft=((1, 2e-3), (8, 2e-3), (64, 7.6e-3)),
)
"""Where nothing was measured yet. The form is that of bfloat16 linear layers without AMX (eight
rows share a pass over the weights, then time is in proportion), a draft of a tenth; what the clock
says of the first steps sets the scale."""


def at(points: Curve, x: float) -> float:
    """A curve's seconds at x: linear between its points and beyond, at least 0. No points: 0."""
    if not points:
        return 0.0
    if len(points) == 1:
        return points[0][1]
    place = bisect_left(points, x, key=lambda point: point[0])
    (x0, y0), (x1, y1) = points[max(0, min(place - 1, len(points) - 2)) :][:2]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))


class CostTables:
    """`StepCosts` by whole rows, times what the clock has said of them.

    Attributes:
        rows: seconds of the linear layers by rows of the batch. sampling: of the sampler,
            corrected; base_sampling: as given.
        factor: measured over predicted forward, by rows of the batch.
        attention: seconds per context row by draft tokens of a request; `attention_steps` what one
            more of them adds.
        draft_factor: measured over predicted drafting.
    """

    def __init__(self, costs: StepCosts, max_draft_tokens: int) -> None:
        self.costs = costs
        self.max_draft_tokens = max_draft_tokens
        self.attention = np.array([at(costs.attention, 1 + k) for k in range(max_draft_tokens + 1)])
        self.attention_steps = np.diff(self.attention)
        self._attention_list = self.attention.tolist()
        self.rows: Floats = np.empty(0)
        self.base_sampling: Floats = np.empty(0)
        self.sampling: Floats = np.empty(0)
        self.factor: Floats = np.empty(0)
        self.draft_factor = 1.0
        self._rounds: dict[int, Floats] = {}
        self._draft_attention = np.array(
            [
                at(costs.draft_attention, 1 + k) + (k - 1) * at(costs.draft_attention, 1)
                if k
                else 0.0
                for k in range(max_draft_tokens + 1)
            ]
        )

    def reserve(self, rows: int) -> bool:
        """Makes the tables reach `rows`; whether they had to grow (`factor` is 1 there)."""
        if rows < len(self.rows):
            return False
        count = max(64, 2 * rows)
        self.rows = np.array([at(self.costs.forward, row) for row in range(count)])
        self.base_sampling = np.array([at(self.costs.sampler, row) for row in range(count)])
        self.sampling = self.base_sampling
        self.factor = np.ones(count)
        return True

    def correct(self, forward: Floats, sampling: float, drafting: float) -> None:
        """Measured over predicted: the forward's by rows, as many as `rows` has."""
        self.factor = forward
        self.sampling = self.base_sampling * sampling
        self.draft_factor = drafting

    def forward_seconds(self, lengths: Sequence[int], contexts: Sequence[int]) -> float:
        """Predicted, without correction, for a step that verifies `lengths` draft tokens, none
        longer than the maximum."""
        rows = sum(lengths) + len(lengths)
        self.reserve(rows)
        seconds = float(self.rows[rows])
        if rows == len(lengths):
            return seconds + self._attention_list[0] * sum(contexts)
        attention = [self._attention_list[length] for length in lengths]
        return seconds + sum(map(operator.mul, attention, contexts))

    def drafting(self, requests: int, context_rows: float) -> Floats:
        """Seconds of a round of K draft steps, by K. A round's first pass sees the K + 1 rows that
        were verified last, each later one a row of each request."""
        if requests not in self._rounds:
            steps = np.arange(len(self._draft_attention), dtype=np.float64)
            alone: Floats = steps * at(self.costs.draft, requests) + self.costs.draft_overhead
            alone[0] = 0.0
            self._rounds[requests] = alone
        return (self._rounds[requests] + context_rows * self._draft_attention) * self.draft_factor

    def catching_up(self, missed_rows: int) -> float:
        """Seconds in which the draft model takes in rows that it missed: a pass over many rows
        costs it what it costs the target, in proportion."""
        if missed_rows <= 0 or not self.costs.draft:
            return 0.0
        one = max(at(self.costs.forward, 1), 1e-12)
        share = at(self.costs.forward, missed_rows) / one
        return self.draft_factor * at(self.costs.draft, 1) * share
