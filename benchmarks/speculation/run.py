"""Draft tokens in turns: BMC with its controller, with fixed lengths and without, and its peers.

Promises that all systems of a case continue the same prompts greedily, in turns, in processes with
the same thread binding and OpenMP runtime; that prompts are run through every model that has them;
and that outputs are compared: with float32 weights, and wherever the text is known, a difference
makes the run fail; with bfloat16 the row says how far outputs agree. Knows nothing of files and
terminals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from benchmarks.engines.speculating import HUGGING_FACE, make
from benchmarks.engines.speculating.base import (
    FIXED,
    NONE,
    Contender,
    Length,
    Setup,
    Speculator,
    take_turns,
)
from benchmarks.lib.ceilings import threads_set
from benchmarks.lib.chain import continuation
from benchmarks.lib.goals import Goal, Verdict, holding, load, under_load
from benchmarks.lib.record import Record, Recorder
from benchmarks.lib.timing import Budget, Timing
from benchmarks.speculation import controller, models
from benchmarks.speculation.cases import AUTO, CONTROLLER, PLAIN, Case
from benchmarks.speculation.rows import Row, Turns, best_fixed, best_own, rows_of
from bmc_core.costs.measure import Progress
from bmc_core.machine.cpu import allowed_cpus, to_list_text
from bmc_core.machine.memory import available_bytes

GOALS = load(Path(__file__).with_name("goals.toml"))
OUT_OF_TIME = "the quick list's seconds are over; --cases full has no limit"


@dataclass(frozen=True)
class Options:
    """A run: `rounds` timed turns of every system.

    Attributes:
        bind: value of VLLM_CPU_OMP_THREADS_BIND; what works in this process has as many threads.
        openmp: which runtime vLLM's processes preload.
        controller: whether the controller is timed.
        seconds: for all cases; None: no limit.
    """

    cases: Sequence[Case]
    bind: str
    openmp: str = "libgomp"
    rounds: int = 3
    controller: bool = True
    seconds: float | None = None


class Report(NamedTuple):
    """All that a run found out.

    Attributes:
        controller: of the controller's step; None: not timed.
        epsilons: by case, of the pairs that were tuned.
        missing: why something was not measured. marked: rows whose outputs differ.
    """

    record: Record
    options: Options
    rows: list[Row]
    controller: Timing | None
    epsilons: dict[str, float]
    failures: list[str]
    missing: list[str]
    marked: list[str]
    verdicts: list[Verdict]


def default_bind() -> str:
    """All CPUs of the affinity mask."""
    return to_list_text(allowed_cpus())


def num_cpus(bind: str) -> int:
    """Of a list as 0-3,8."""
    ranges = [part.split("-") for part in bind.split(",")]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def run(options: Options, tell: Progress = lambda text, fraction: None) -> Report:
    """Measures every case.

    Raises:
        WorkerError: an engine could not do what was asked.
    """
    recorder = Recorder()
    session = _Session(options, tell)
    with threads_set(num_cpus(options.bind)):
        timed = controller.measure() if options.controller else None
        session.measure()
    tell("done", 1.0)
    record = recorder.record()
    goals = holding(GOALS, record.isas)
    verdicts = under_load(judge(session.rows, timed, goals), record.machine.others)
    found = (session.epsilons, session.failures, session.missing, session.marked)
    return Report(record, options, session.rows, timed, *found, verdicts)


def _group(case: Case) -> tuple[object, ...]:
    """Cases of a group run on the same engines."""
    return case.pair, tuple(name for name, _ in case.systems)


def _lengths(case: Case) -> list[tuple[str, Length]]:
    """Every system of the case with every draft length that it is tried with."""
    return [(name, length) for name, lengths in case.systems for length in lengths]


def _mode(length: Length) -> str:
    """Of the speculator that serves it."""
    return length if isinstance(length, str) else FIXED


class _Session:
    """The loop over groups of cases."""

    def __init__(self, options: Options, tell: Progress) -> None:
        self.options, self.tell = options, tell
        self.rows: list[Row] = []
        self.epsilons: dict[str, float] = {}
        self.failures: list[str] = []
        self.missing: list[str] = []
        self.marked: list[str] = []
        self._budget = Budget(options.seconds)
        self._done = 0

    def measure(self) -> None:
        groups = [list(cases) for _, cases in groupby(self.options.cases, _group)]
        with ExitStack() as stack:
            written = models.Models()
            stack.callback(written.close)
            for cases in groups:
                if self._budget.is_spent():
                    self._leave_out(cases, OUT_OF_TIME)
                else:
                    self._measure(cases, written)

    def _leave_out(self, cases: Sequence[Case], why: str) -> None:
        self.missing += [f"{case.name}: {why}" for case in cases]
        self._done += len(cases)

    def _tell(self, text: str, part: float = 0.0) -> None:
        self.tell(text, (self._done + part) / len(self.options.cases))

    def _measure(self, cases: Sequence[Case], written: models.Models) -> None:
        first = cases[0]
        speculators = self._speculators(cases)
        if not speculators:
            return
        self._tell(f"{first.name}: writing the models")
        setup = written.setup(cases)
        epsilon = written.epsilon(first.pair)
        if epsilon is not None:
            self.epsilons |= {case.name: epsilon for case in cases}
        lacking = lacking_memory(speculators, setup)
        if lacking is not None:
            self._leave_out(cases, lacking)
            return
        with ExitStack() as stack:
            for number, one in enumerate(speculators):
                if self._budget.is_spent():
                    self._leave_out(cases, OUT_OF_TIME)
                    return
                stack.callback(one.close)
                self._tell(f"{one.title}, {one.mode}: starting", 0.5 * number / len(speculators))
                one.start(setup)
            self._check_threads(first, speculators)
            for case in cases:
                if self._budget.is_spent():
                    self._leave_out([case], OUT_OF_TIME)
                else:
                    self._case(case, speculators, len(cases))

    def _speculators(self, cases: Sequence[Case]) -> list[Speculator]:
        """One for each system and mode that a case has, and that can run here."""
        wanted: dict[tuple[str, str], Speculator | None] = {}
        for name, length in (pair for case in cases for pair in _lengths(case)):
            key = name, _mode(length)
            if key not in wanted:
                wanted[key] = self._made(cases[0], *key)
        return [one for one in wanted.values() if one is not None]

    def _made(self, case: Case, name: str, mode: str) -> Speculator | None:
        try:
            return make(name, mode, bind=self.options.bind, openmp=self.options.openmp)
        except ImportError as error:
            self.missing.append(f"{case.name}: {name}, draft tokens {mode}: {error}")
        return None

    def _check_threads(self, case: Case, speculators: Sequence[Speculator]) -> None:
        threads = {f"{one.title}, {one.mode}": one.threads for one in speculators}
        if len(set(threads.values())) > 1:
            self.failures.append(f"{case.name}: the systems have {threads} threads")

    def _case(self, case: Case, speculators: Sequence[Speculator], of: int) -> None:
        by_mode = {(one.name, one.mode): one for one in speculators}
        contenders = [
            Contender(by_mode[name, _mode(length)], length)
            for name, length in _lengths(case)
            if (name, _mode(length)) in by_mode
        ]
        prompts = models.prompts(case)
        turns = take_turns(
            contenders,
            prompts,
            case.new,
            self.options.rounds,
            self._budget.part(of),
            lambda done: self._tell(f"{case.name}: continuing in turns", done),
        )
        rounds = min(map(len, turns.values()))
        if rounds < self.options.rounds:
            self.missing.append(
                f"{case.name}: rounds {rounds + 1} to {self.options.rounds}: {OUT_OF_TIME}"
            )
        rows = rows_of(case, contenders, turns, _reference(case, prompts, turns))
        self.rows += rows
        self._check_outputs(case, rows)
        self._done += 1

    def _check_outputs(self, case: Case, rows: Sequence[Row]) -> None:
        exact = case.pair.shape.dtype == "float32" or case.text == PLAIN
        for row in rows:
            if row.agreement == 1.0:
                continue
            text = (
                f"{case.name}: {row.title}, draft tokens {row.length}: {row.agreement:.1%} of the "
                "tokens are the reference's, up to the first difference"
            )
            (self.failures if exact else self.marked).append(text)


def _reference(
    case: Case, prompts: Sequence[Sequence[int]], turns: Turns
) -> Sequence[Sequence[int]]:
    """What every system should say: known, or what the peer says without draft tokens."""
    if case.text == PLAIN:
        vocabulary = case.pair.shape.vocabulary
        return [continuation(vocabulary, list(prompt), case.new) for prompt in prompts]
    keys = [(name, NONE) for name, _ in case.systems if (name, NONE) in turns]
    return turns[keys[0] if keys else next(iter(turns))][0].outputs


def lacking_memory(speculators: Sequence[Speculator], setup: Setup) -> str | None:
    """Why the systems do not fit together; None: they do."""
    needed = sum(one.start_bytes(setup) for one in speculators)
    if any(one.name in HUGGING_FACE for one in speculators):
        needed += setup.weight_bytes
    free = available_bytes()
    if needed <= free:
        return None
    return f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"


def judge(
    rows: Sequence[Row], controller_timing: Timing | None, goals: Sequence[Goal]
) -> list[Verdict]:
    """Each goal; what a speedup over none can be at most follows from tokens a step and the cost of
    the forward."""
    verdicts = []
    for goal in goals:
        if goal.case == CONTROLLER:
            value = None if controller_timing is None else controller_timing.ms * 1e3
            verdicts.append(Verdict(goal.case, goal, value))
            continue
        ours = [r for r in rows if r.case.name == goal.case and r.system == goal.system]
        theirs = [r for r in rows if r.case.name == goal.case and r.system == goal.against]
        auto = next((row for row in ours if row.length == AUTO), None)
        value = None if auto is None else _value(goal.metric, auto, ours, theirs)
        floor = None
        if auto is not None and goal.metric == "over_none" and math.isfinite(auto.bound):
            floor = max((row.bound for row in ours if math.isfinite(row.bound)), default=None)
        verdicts.append(Verdict(goal.case, goal, value, floor))
    return verdicts


def _value(metric: str, auto: Row, ours: Sequence[Row], theirs: Sequence[Row]) -> float | None:
    """The controller's figure; None where what it is compared with was not measured."""
    if metric == "over_none":
        found = auto.over_none
    elif metric == "of_bound":
        found = auto.over_none / auto.bound
    else:
        other = best_fixed(ours) if metric == "over_fixed" else best_own(theirs)
        found = math.nan if other is None else auto.tokens_per_second / other.tokens_per_second
    return found if math.isfinite(found) else None
