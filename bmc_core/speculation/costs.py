"""What one step of speculative decoding costs, as curves that a calibration measures.

Promises plain seconds: `StepCosts` sums the parts of a step from its curves. Knows neither
acceptance nor how the curves were measured.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

Curve = tuple[tuple[int, float], ...]


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
        sampler: rows sampled or verified -> seconds.
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
        for name in ("forward", "attention", "draft", "draft_attention", "sampler"):
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
            ValueError: as the constructor; an unknown name.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"{unknown[0]}: expected one of {', '.join(sorted(known))}")
        return cls(
            **{
                name: value
                if name == "draft_overhead"
                else tuple((int(x), float(y)) for x, y in value)
                for name, value in data.items()
            }
        )


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


def at(points: Curve, x: float) -> float:
    """A curve's seconds at x: linear between its points and beyond, at least 0. No points: 0."""
    if not points:
        return 0.0
    if len(points) == 1:
        return points[0][1]
    place = bisect_left(points, x, key=lambda point: point[0])
    (x0, y0), (x1, y1) = points[max(0, min(place - 1, len(points) - 2)) :][:2]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))
