"""The analytical model against real generations.

Sweeps r over greedy generations of a small Llama whose K and V outweigh its weights, for several
prompts P and lengths N, and holds two promises of the model against what was measured: the r that
`auto_policy` picks is within 5 % of the fastest, and where padding is paid T* grows with sqrt(N).

Promises that the runs take turns, that every token is compared with those of transformers' own
cache, and that each figure is a sum over steps of the median over rounds, with the quartiles of the
rounds' own sums as spread. A generation of the longest N also tells the shorter ones: its first
rows are theirs. Knows nothing of files and terminals.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.growth.cases import Options, Run, runs_of
from benchmarks.growth.curves import Curve, Slope, curve_of, judge, slopes_of
from benchmarks.growth.generation import Generated, Generator
from benchmarks.lib.ceilings import threads_set
from benchmarks.lib.goals import Verdict
from benchmarks.lib.record import Record, Recorder
from benchmarks.lib.timing import Budget
from bmc_core.costs.calibration import Calibration, calibrate
from bmc_core.costs.geometry import Geometry
from bmc_core.costs.measure import Progress
from bmc_core.policy import BMCPolicy

MAX_DISAGREEMENT = 0.02
"""Share of tokens after a sequence's first difference that float32 rounding may cause."""


class Report(NamedTuple):
    """All that a run found out; `missing`: what was left out for want of time."""

    record: Record
    options: Options
    calibration: Calibration
    curves: list[Curve]
    slopes: list[Slope]
    failures: list[str]
    missing: list[str]
    verdicts: list[Verdict]


def run(options: Options, tell: Progress = lambda text, fraction: None) -> Report:
    """Calibrates, then measures all generations in turns."""
    recorder = Recorder()
    budget = Budget(options.seconds, options.clock)
    missing: list[str] = []
    with threads_set(options.threads):
        generator = Generator(
            options.shape, options.batch_size, max(options.prompts) + max(options.lengths) + 1
        )
        geometry = Geometry.from_config(generator.config, torch.float32)
        calibration = calibrate(
            geometry,
            refresh=True,
            seconds=options.calibration_seconds,
            progress=lambda text, done: tell(f"calibrating: {text}", 0.05 * done),
        )
        tell("tokens of transformers' own cache", 0.05)
        start = options.clock()
        shortest = replace(options, lengths=(min(options.lengths),))
        references = _references(shortest, generator)
        rows = len(options.prompts) * min(options.lengths)
        per_row = (options.clock() - start) / rows
        options = _affordable(options, geometry, per_row, budget, missing)
        if len(options.lengths) > 1:
            references = _references(options, generator)
        runs = runs_of(options, geometry) if options.lengths else []
        results, failures = _Session(options, generator, references, runs, missing).measure(
            budget, tell
        )
    curves = [
        curve_of(options, calibration, runs, results, attention, prompt, new)
        for attention in options.attentions
        for prompt in options.prompts
        for new in options.lengths
    ]
    slopes = slopes_of(options, curves)
    tell("done", 1.0)
    record = recorder.record()
    verdicts = judge(curves, slopes, record)
    return Report(record, options, calibration, curves, slopes, failures, missing, verdicts)


def _references(options: Options, generator: Generator) -> dict[int, torch.Tensor]:
    """By P, the tokens of transformers' own cache."""
    longest = max(options.lengths)
    return {
        prompt: generator.generate("sdpa", None, prompt, longest, None).tokens
        for prompt in options.prompts
    }


def _affordable(
    options: Options, geometry: Geometry, per_row: float, budget: Budget, missing: list[str]
) -> Options:
    """Without the longest N while the references and one round at `per_row` seconds a row would
    take longer than there is; none may be left."""
    lengths = sorted(options.lengths)
    while lengths:
        fewer = replace(options, lengths=tuple(lengths))
        seconds = per_row * sum(run.new_rows for run in runs_of(fewer, geometry))
        if len(lengths) > 1:
            seconds += per_row * len(options.prompts) * lengths[-1]
        if seconds <= budget.left():
            return fewer
        missing.append(
            f"N = {lengths.pop()}: a round would take {seconds:.0f} s, {budget.left():.0f} are "
            "left; --cases full has no limit"
        )
    return replace(options, lengths=())


class _Session:
    """The generations, in turns."""

    def __init__(
        self,
        options: Options,
        generator: Generator,
        references: dict[int, torch.Tensor],
        runs: list[Run],
        missing: list[str],
    ) -> None:
        self.options, self.generator, self.references = options, generator, references
        self.runs, self.missing = runs, missing
        self.failures: list[str] = []

    def measure(self, budget: Budget, tell: Progress) -> tuple[list[list[Generated]], list[str]]:
        """Every run `rounds` times, or as often as there is time for, but once; each round starts
        at another one."""
        options, runs = self.options, self.runs
        if not runs:
            return [], self.failures
        for attention in options.attentions:  # what is made once is not timed
            self.generator.generate(attention, BMCPolicy(r=8), options.prompts[0], 16, None)
        results: list[list[Generated]] = [[] for _ in runs]
        work = sum(run.new_rows for run in runs) * options.rounds
        done = 0
        longest_round = 0.0
        for turn in range(options.rounds):
            if turn and longest_round > budget.left():
                self.missing.append(f"rounds {turn + 1} to {options.rounds}: out of time")
                break
            before = budget.left()
            start = turn * len(runs) // options.rounds
            for place in (*range(start, len(runs)), *range(start)):
                one = runs[place]
                tell(f"{one.attention}, P {one.prompt_rows}, r {one.r}", 0.05 + 0.95 * done / work)
                results[place].append(self._generate(one))
                done += one.new_rows
            if options.seconds is not None:
                longest_round = max(longest_round, before - budget.left())
        return results, self.failures

    def _generate(self, one: Run) -> Generated:
        found = self.generator.generate(
            one.attention, BMCPolicy(r=one.r), one.prompt_rows, one.new_rows, one.limit
        )
        differing = _disagreement(found.tokens, self.references[one.prompt_rows])
        if differing > MAX_DISAGREEMENT:
            self.failures.append(
                f"{one.attention}, P {one.prompt_rows}, r {one.r}: {differing:.1%} of the tokens "
                f"are not those of transformers' own cache; allowed: {MAX_DISAGREEMENT:.0%}"
            )
        return found


def _disagreement(tokens: torch.Tensor, reference: torch.Tensor) -> float:
    same = tokens == reference[:, : tokens.shape[1]]
    return 1.0 - float(same.to(torch.float64).cumprod(dim=1).mean())
