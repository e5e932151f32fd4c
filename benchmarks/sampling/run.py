"""A step's sampling, vLLM's samplers and BMC's in turns.

Promises that BMC's tokens are checked against those of vLLM's plain operators for the same seeds,
row by row, and vLLM's greedy ones against the largest logits. Knows nothing of files and terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.lib import goals
from benchmarks.lib.ceilings import threads_set
from benchmarks.lib.goals import Goal, Verdict
from benchmarks.lib.record import Record, Recorder
from benchmarks.lib.timing import Timed, Timing, alternate
from benchmarks.sampling.cases import CASES, Case
from benchmarks.sampling.samplers import BMCSide, Side, Step, VLLMSide, prepare
from bmc_core.costs.measure import Progress

SIDES: tuple[type[Side], ...] = (BMCSide, VLLMSide)
GOALS = goals.load(Path(__file__).parent / "goals.toml")


@dataclass(frozen=True)
class Options:
    """A run.

    Attributes:
        seconds: of timing, for each case.
        threads: OpenMP threads of both sides.
    """

    cases: Sequence[Case] = CASES
    seconds: float = 1.5
    threads: int = 1
    goals: Sequence[Goal] = tuple(GOALS)


class Row(NamedTuple):
    """One side's sampling of one step."""

    case: Case
    name: str
    title: str
    timing: Timing


class Report(NamedTuple):
    """All that a run found out."""

    record: Record
    options: Options
    rows: list[Row]
    verdicts: list[Verdict]
    failures: list[str]

    def ratio(self, case: Case) -> float:
        """Time of vLLM's samplers over that of BMC's."""
        return _ratio(self.rows, case)


class _Calls(Timed):
    def __init__(self, side: Side, threads: int) -> None:
        self.side = side
        self.threads = threads

    def enter(self) -> None:
        torch.set_num_threads(self.threads)

    def call(self, index: int) -> None:
        self.side.sample()


def run(options: Options, tell: Progress = lambda text, fraction: None) -> Report:
    """Measures every case."""
    recorder = Recorder()
    rows: list[Row] = []
    failures: list[str] = []
    prepare()
    with threads_set(options.threads), torch.inference_mode():
        for place, case in enumerate(options.cases):
            tell(case.name, place / len(options.cases))
            step = Step(case)
            sides = [side(step) for side in SIDES]
            failures += [text for side in sides for text in _failures(side, step)]
            timings = alternate([_Calls(side, options.threads) for side in sides], options.seconds)
            rows += [
                Row(case, side.name, side.title, timing)
                for side, timing in zip(sides, timings, strict=True)
            ]
    record = recorder.record()
    return Report(record, options, rows, _judge(rows, record, options.goals), failures)


def _failures(side: Side, step: Step) -> list[str]:
    if side.name == "vllm" and step.case.mode != "greedy" and step.case.drafts is not None:
        return []  # its seeds give other tokens with draft tokens than without
    found = side.sample(step.seeded()).sampled_token_ids.tolist()
    tokens = [[token for token in row if token != -1] for row in found]
    if tokens == step.expected():
        return []
    return [f"{side.title} is wrong: {step.case.name}: tokens that the seeds do not give"]


def _ratio(rows: Sequence[Row], case: Case) -> float:
    ms = {row.name: row.timing.ms for row in rows if row.case == case}
    return ms["vllm"] / ms["bmc"]


def _judge(rows: Sequence[Row], record: Record, stated: Sequence[Goal]) -> list[Verdict]:
    measured = {row.case.name: _ratio(rows, row.case) for row in rows}
    return [
        Verdict(goal.case, goal, measured.get(goal.case))
        for goal in stated
        if goal.holds_for(record.isas)
    ]
