"""`python -m benchmarks model`: the analytical model against real generations.

Sweeps r over greedy generations of a small Llama whose K and V outweigh its weights, for several
prompts P and lengths N, and holds two promises of the model against what was measured: the r that
`auto_policy` picks is within 5 % of the fastest, and where padding is paid T* grows with sqrt(N).

Promises that the runs take turns, that every token is compared with those of transformers' own
cache, and that each figure is a sum over steps of the median over rounds, with the quartiles of the
rounds' own sums as spread. A generation of the longest N also tells the shorter ones: its first
rows are theirs. Knows nothing of files and terminals.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.growth.generation import PATHS, Generated, Generator, ModelShape
from benchmarks.lib.ceilings import Machine, describe, threads_set, versions
from benchmarks.lib.timing import Timing, summary
from bmc_core.costs.calibration import NATIVE_ROW_MULTIPLE, Calibration, auto_policy, calibrate
from bmc_core.costs.geometry import Geometry
from bmc_core.costs.measure import Progress
from bmc_core.costs.model import Costs, Workload, best_growths, predict
from bmc_core.machine.load import Neighbors
from bmc_core.policy import BMCPolicy

MAX_LOSS = 0.05
"""How much slower than the fastest r the picked one may be."""
SLOPE, SLOPE_MARGIN = 0.5, 0.1
"""Of log T* over log N, for the path that pays padding. The paper's law is for P = 0; it is held
against prompts of at most `SHORT_PROMPT` of the shortest N, longer ones only against the model."""
SHORT_PROMPT = 0.25
MAX_DISAGREEMENT = 0.02
"""Share of tokens after a sequence's first difference that float32 rounding may cause."""


@dataclass(frozen=True)
class Options:
    """A run: `lengths` are the N, `prompts` the P, `rows` the r of the sweep."""

    lengths: Sequence[int]
    prompts: Sequence[int]
    threads: int
    rounds: int
    batch_size: int = 8
    paths: Sequence[str] = PATHS
    rows: Sequence[int] = (8, 16, 32, 64, 128, 256)
    shape: ModelShape = field(default_factory=ModelShape)
    calibration_seconds: float = 5.0


class Point(NamedTuple):
    """One r on one (path, P, N).

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
    """All r of one (path, P, N).

    Attributes:
        best_growths: T* of the model, and measured (None where padding is free): the minimum of
            a T + b / T + c fitted to the times. `left_out_best`: T* measured without one of the
            rounds each. `loss`: of the picked r over the fastest.
    """

    path: str
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

    `has_goal`: whether the prompt is short enough for the paper's law; `met`: None without.
    """

    prompt_rows: int
    has_goal: bool
    measured: float
    low: float
    high: float
    predicted: float

    @property
    def met(self) -> bool | None:
        return abs(self.measured - SLOPE) <= SLOPE_MARGIN if self.has_goal else None


class ModelReport(NamedTuple):
    """All that a run found out. `others`: share of the cores that other processes took."""

    options: Options
    machine: Machine
    versions: dict[str, str]
    calibration: Calibration
    curves: list[Curve]
    slopes: list[Slope]
    failures: list[str]


class _Run(NamedTuple):
    """One generation to be repeated. `limit`: told to the cache and the policy, if not None."""

    path: str
    prompt_rows: int
    new_rows: int
    r: int
    limit: int | None
    picked: bool = False
    up_front: bool = False


def run(options: Options, tell: Progress = lambda text, fraction: None) -> ModelReport:
    """Calibrates, then measures all generations in turns."""
    neighbors = Neighbors()
    longest = max(options.lengths)
    with threads_set(options.threads):
        generator = Generator(options.shape, options.batch_size, max(options.prompts) + longest + 1)
        geometry = Geometry.from_config(generator.config, torch.float32)
        calibration = calibrate(
            geometry,
            refresh=True,
            seconds=options.calibration_seconds,
            progress=lambda text, done: tell(f"calibrating: {text}", 0.05 * done),
        )
        runs = _runs(options, geometry)
        results, failures = _measure(options, generator, runs, tell)
    curves = [
        _curve(options, calibration, runs, results, path, prompt, new)
        for path in options.paths
        for prompt in options.prompts
        for new in options.lengths
    ]
    tell("done", 1.0)
    return ModelReport(
        options,
        describe()._replace(others=neighbors.share()),
        versions(),
        calibration,
        curves,
        _slopes(options, curves),
        failures,
    )


def _runs(options: Options, geometry: Geometry) -> list[_Run]:
    """The sweep at the longest N, and for each N the picked r and all rows up front."""
    runs: list[_Run] = []
    longest = max(options.lengths)
    for path in options.paths:
        for prompt in options.prompts:
            runs += [
                _Run(path, prompt, longest, r, None) for r in options.rows if r <= prompt + longest
            ]
            for new in options.lengths:
                limit = prompt + new
                policy = auto_policy(
                    geometry,
                    batch_size=options.batch_size,
                    prompt_rows=prompt,
                    total_rows=limit,
                    attention=path,  # type: ignore[arg-type]
                )
                picked = policy.r
                runs.append(_Run(path, prompt, new, picked, limit, True, picked >= limit))
                if picked < limit:
                    runs.append(_Run(path, prompt, new, limit, limit, False, True))
    return runs


def _measure(
    options: Options, generator: Generator, runs: list[_Run], tell: Progress
) -> tuple[list[list[Generated]], list[str]]:
    """Every run `rounds` times, in turns; each round starts at another one."""
    references = {
        prompt: generator.generate("sdpa", None, prompt, max(options.lengths), None).tokens
        for prompt in options.prompts
    }
    for path in options.paths:  # what is made once is not timed
        generator.generate(path, BMCPolicy(r=8), options.prompts[0], 16, None)
    results: list[list[Generated]] = [[] for _ in runs]
    failures: list[str] = []
    work = sum(run.new_rows for run in runs) * options.rounds
    done = 0
    for turn in range(options.rounds):
        start = turn * len(runs) // options.rounds
        for place in (*range(start, len(runs)), *range(start)):
            one = runs[place]
            tell(f"{one.path}, P {one.prompt_rows}, r {one.r}", 0.05 + 0.95 * done / work)
            found = generator.generate(
                one.path, BMCPolicy(r=one.r), one.prompt_rows, one.new_rows, one.limit
            )
            differing = _disagreement(found.tokens, references[one.prompt_rows])
            if differing > MAX_DISAGREEMENT:
                failures.append(
                    f"{one.path}, P {one.prompt_rows}, r {one.r}: {differing:.1%} of the tokens "
                    f"are not those of transformers' own cache; allowed: {MAX_DISAGREEMENT:.0%}"
                )
            results[place].append(found)
            done += one.new_rows
    return results, failures


def _disagreement(tokens: torch.Tensor, reference: torch.Tensor) -> float:
    same = tokens == reference[:, : tokens.shape[1]]
    return 1.0 - float(same.to(torch.float64).cumprod(dim=1).mean())


def work_of(options: Options, path: str, prompt: int, new: int) -> Workload:
    """The model's workload for one of the benchmark's."""
    multiple = NATIVE_ROW_MULTIPLE if path == "native" else 1
    return Workload(prompt, new, options.batch_size, row_multiple=multiple)


def _curve(
    options: Options,
    calibration: Calibration,
    runs: list[_Run],
    results: list[list[Generated]],
    path: str,
    prompt: int,
    new: int,
) -> Curve:
    costs = calibration.costs(path, options.batch_size, prompt + new)  # type: ignore[arg-type]
    work = work_of(options, path, prompt, new)
    points = []
    for one, found in zip(runs, results, strict=True):
        if (one.path, one.prompt_rows) != (path, prompt):
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
    return Curve(path, prompt, new, points, best_growths(work, costs), measured, each, loss)


def _sum_of_medians(found: list[Generated], new_rows: int) -> float:
    """Milliseconds: each step's median over the rounds, summed up."""
    steps = zip(*(generated.step_seconds[:new_rows] for generated in found), strict=True)
    return 1e3 * sum(statistics.median(step) for step in steps)


def _point(one: _Run, found: list[Generated], work: Workload, costs: Costs) -> Point:
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


def _slopes(options: Options, curves: list[Curve]) -> list[Slope]:
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
