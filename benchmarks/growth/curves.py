"""What repeated generations say: times against r beside the model's, T*, slopes, goals.

Promises figures that follow from the seconds alone. Knows nothing of how they were measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.growth.cases import Options, Run
from benchmarks.growth.generation import Generated
from benchmarks.lib.goals import Verdict, holding, load
from benchmarks.lib.record import Record
from benchmarks.lib.timing import Timing, summary
from bmc_core.costs.calibration import NATIVE_ROW_MULTIPLE, Calibration
from bmc_core.costs.model import Costs, Workload, best_growths, predict
from bmc_core.policy import BMCPolicy

GOALS = load(Path(__file__).with_name("goals.toml"))
SLOPE = 0.5
"""Of log T* over log N, where padding is paid. The paper's law is for P = 0; it is held against
prompts of at most `SHORT_PROMPT` of the shortest N, longer ones only against the model."""
SHORT_PROMPT = 0.25


class Point(NamedTuple):
    """One r on one (attention, P, N).

    Attributes:
        growths: after the prompt. `timing`: of all N steps, in milliseconds; its `ms` is the sum of
            the steps' medians, the rest that of the rounds' sums.
        rounds: their sums. `left_out`: the `ms` without one of the rounds each.
        predicted: seconds of growths, padding and reading by the model.
        picked, up_front: whether it is `auto_policy`'s r; whether it holds all rows at once.
    """

    r: int
    growths: int
    timing: Timing
    rounds: list[float]
    left_out: list[float]
    predicted: float
    picked: bool
    up_front: bool


class Curve(NamedTuple):
    """All r of one (attention, P, N).

    Attributes:
        best_growths: T* of the model, and measured (None where padding is free): the minimum of
            a T + b / T + c fitted to the times. `left_out_best`: T* measured without one of the
            rounds each. `loss`: of the picked r over the fastest.
    """

    attention: str
    prompt_rows: int
    new_rows: int
    points: list[Point]
    predicted_best: float
    measured_best: float | None
    left_out_best: list[float]
    loss: float

    @property
    def picked(self) -> Point:
        return next(point for point in self.points if point.picked)

    @property
    def fastest(self) -> Point:
        return min(self.points, key=lambda point: point.timing.ms)

    @property
    def offset(self) -> float:
        """Seconds that do not depend on r: the median of measured less predicted."""
        return statistics.median(p.timing.ms / 1e3 - p.predicted for p in self.points)


class Slope(NamedTuple):
    """Of log T* over log N: measured, its range when one round is left out, and the model's.

    `has_goal`: whether the prompt is short enough for the paper's law.
    """

    prompt_rows: int
    has_goal: bool
    measured: float
    low: float
    high: float
    predicted: float

    @property
    def off(self) -> float:
        """Distance from the law's; infinite where there is no slope."""
        return math.inf if math.isnan(self.measured) else abs(self.measured - SLOPE)


def work_of(options: Options, attention: str, prompt: int, new: int) -> Workload:
    """The model's workload for one of the benchmark's."""
    multiple = NATIVE_ROW_MULTIPLE if attention == "native" else 1
    return Workload(prompt, new, options.batch_size, row_multiple=multiple)


def curve_of(
    options: Options,
    calibration: Calibration,
    runs: list[Run],
    results: list[list[Generated]],
    attention: str,
    prompt: int,
    new: int,
) -> Curve:
    costs = calibration.costs(attention, options.batch_size, prompt + new)  # type: ignore[arg-type]
    work = work_of(options, attention, prompt, new)
    points = []
    for one, found in zip(runs, results, strict=True):
        if (one.attention, one.prompt_rows) != (attention, prompt):
            continue
        if one.new_rows == new if one.limit else one.r < prompt + new:
            points.append(_point(one, found, work, costs))
    points.sort(key=lambda point: (point.r, not point.picked))
    fastest = min(point.timing.ms for point in points)
    loss = next(point.timing.ms for point in points if point.picked) / fastest - 1
    measured, each = None, []
    if costs.c_row > 0.0:
        measured = fitted_growths(new, points, [point.timing.ms for point in points])
        count = min(len(point.left_out) for point in points)
        each = [fitted_growths(new, points, [p.left_out[i] for p in points]) for i in range(count)]
    return Curve(attention, prompt, new, points, best_growths(work, costs), measured, each, loss)


def _sum_of_medians(found: list[Generated], new_rows: int) -> float:
    """Milliseconds: each step's median over the rounds, summed up."""
    steps = zip(*(generated.step_seconds[:new_rows] for generated in found), strict=True)
    return 1e3 * sum(statistics.median(step) for step in steps)


def _point(one: Run, found: list[Generated], work: Workload, costs: Costs) -> Point:
    new = work.new_rows
    rounds = [sum(generated.step_seconds[:new]) for generated in found]
    total = _sum_of_medians(found, new)
    fewer = [found[:i] + found[i + 1 :] for i in range(len(found))] if len(found) > 1 else [found]
    result = predict(BMCPolicy(r=one.r), work, costs, know_limit=one.limit is not None)
    return Point(
        one.r,
        result.growths,
        summary(rounds)._replace(ms=total),
        [1e3 * seconds for seconds in rounds],
        [_sum_of_medians(others, new) for others in fewer],
        result.cache_seconds,
        one.picked,
        one.up_front,
    )


def fitted_growths(new_rows: int, points: Sequence[Point], ms: Sequence[float]) -> float:
    """T*: where a T + b / T + c, fitted to the times by least squares, is least; T = N / r.

    NaN where the times have no minimum of this form.
    """
    growths = np.array([max(1.0, new_rows / point.r) for point in points])
    times = np.array(ms)
    terms = np.stack([growths, 1.0 / growths, np.ones_like(growths)], axis=1)
    (a, b, _), *_ = np.linalg.lstsq(terms, times, rcond=None)
    return math.sqrt(b / a) if a > 0 and b > 0 else math.nan


def slope_of(lengths: Sequence[int], growths: Sequence[float]) -> float:
    """Slope of log T* over log N; NaN where there is no T* or a single N."""
    if len(lengths) < 2 or not all(math.isfinite(g) and g > 0 for g in growths):
        return math.nan
    return float(np.polyfit(np.log(lengths), np.log(growths), 1)[0])


def slopes_of(options: Options, curves: list[Curve]) -> list[Slope]:
    slopes = []
    for prompt in options.prompts:
        chosen = [c for c in curves if c.prompt_rows == prompt and c.measured_best is not None]
        if len(chosen) < 2:
            continue
        lengths = [curve.new_rows for curve in chosen]
        rounds = min(len(curve.left_out_best) for curve in chosen)
        each = [slope_of(lengths, [c.left_out_best[i] for c in chosen]) for i in range(rounds)]
        each = [value for value in each if math.isfinite(value)] or [math.nan]
        slopes.append(
            Slope(
                prompt,
                prompt <= SHORT_PROMPT * min(lengths),
                slope_of(lengths, [c.measured_best or math.nan for c in chosen]),
                min(each),
                max(each),
                slope_of(lengths, [c.predicted_best for c in chosen]),
            )
        )
    return slopes


def judge(curves: Sequence[Curve], slopes: Sequence[Slope], record: Record) -> list[Verdict]:
    """The picked r of every curve, and every slope that the paper's law is for."""
    verdicts = []
    for goal in holding(GOALS, record.isas):
        if goal.metric == "loss":
            verdicts += [
                Verdict(f"{c.attention}, P {c.prompt_rows}, N {c.new_rows}", goal, c.loss)
                for c in curves
            ]
        else:
            verdicts += [
                Verdict(f"P {slope.prompt_rows}, log T* over log N", goal, slope.off)
                for slope in slopes
                if slope.has_goal
            ]
    return verdicts
