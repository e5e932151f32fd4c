"""Write and attention of a tiny layer, side by side, in microseconds.

Promises that each side's answer is checked before and after it is timed. Knows nothing of files and
terminals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.lib import goals
from benchmarks.lib.answers import largest_error, relative_error
from benchmarks.lib.ceilings import threads_set
from benchmarks.lib.goals import Goal, Verdict
from benchmarks.lib.record import Record, Recorder
from benchmarks.lib.timing import Timed, Timing, alternate
from benchmarks.overhead.layers import BMCLayer, CPUAttnLayer, Inputs, Layer, NativePart
from bmc_core import native
from bmc_core.costs.measure import Progress

SIDES: tuple[type[Layer], ...] = (BMCLayer, NativePart, CPUAttnLayer)
BOTH = "write and attend"
GOALS = goals.load(Path(__file__).parent / "goals.toml")
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Options:
    """A run.

    Attributes:
        seconds: of timing, all sides together.
        isa: instruction set forced on BMC.
        calls: in a row for one sample: a single one is shorter than what a clock tells.
    """

    seconds: float = 3.0
    isa: str | None = None
    calls: int = 200
    goals: Sequence[Goal] = tuple(GOALS)


class Row(NamedTuple):
    """A side's calls of one kind; the times of `timing` are those of `calls` of them."""

    name: str
    title: str
    work: str
    timing: Timing
    calls: int

    def microseconds(self, ms: float) -> float:
        return ms * 1e3 / self.calls


class Report(NamedTuple):
    """All that a run found out."""

    record: Record
    options: Options
    rows: list[Row]
    verdicts: list[Verdict]
    failures: list[str]


class _Calls(Timed):
    """The same calls in a row, on one thread: nothing here is worth a second one."""

    threads = 1

    def __init__(self, calls: int, *work: Callable[[], None]) -> None:
        self.calls = calls
        self.work = work

    def enter(self) -> None:
        torch.set_num_threads(1)

    def call(self, index: int) -> None:
        for _ in range(self.calls):
            for work in self.work:
                work()


def run(options: Options, tell: Progress = lambda text, fraction: None) -> Report:
    """Measures every side.

    Raises:
        ValueError: `isa` is not usable on this machine.
    """
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        if options.isa is not None:
            stack.enter_context(native.forced_isa(options.isa))
        stack.enter_context(threads_set(1))
        stack.enter_context(torch.inference_mode())
        inputs = Inputs()
        layers = [side(inputs) for side in SIDES]
        for layer in layers:
            layer.load()
        before = [_error(layer) for layer in layers]
        work = [
            (layer, name, _Calls(options.calls, *calls))
            for layer in layers
            for name, calls in (
                ("write", [layer.write]),
                ("attend", [layer.attend]),
                (BOTH, [layer.write, layer.attend]),
            )
        ]
        timings = alternate(
            [trial for _, _, trial in work],
            options.seconds,
            tick=lambda fraction: tell("write and attend", fraction),
        )
        failures = _failures(layers, before)
        record = recorder.record()
    rows = [
        Row(layer.name, layer.title, name, timing, options.calls)
        for (layer, name, _), timing in zip(work, timings, strict=True)
    ]
    return Report(record, options, rows, _judge(rows, record, options.goals), failures)


def _error(layer: Layer) -> float:
    layer.out.fill_(float("nan"))
    layer.write()
    layer.attend()
    return relative_error(layer.out, layer.inputs.reference)


def _failures(layers: Sequence[Layer], before: Sequence[float]) -> list[str]:
    failures = []
    for layer, first in zip(layers, before, strict=True):
        error = largest_error(first, _error(layer))
        if not error <= TOLERANCE:
            failures.append(
                f"{layer.title} is wrong: relative error {error:.2e}; allowed: {TOLERANCE:.0e}"
            )
    return failures


def _judge(rows: Sequence[Row], record: Record, stated: Sequence[Goal]) -> list[Verdict]:
    measured = {(row.name, row.work): row.microseconds(row.timing.ms) for row in rows}
    return [
        Verdict(goal.case, goal, measured.get((goal.system, goal.case)))
        for goal in stated
        if goal.holds_for(record.isas)
    ]
