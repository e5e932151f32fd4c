"""Attention of one layer: BMC and its peers on every case, in turns, under two ceilings.

Promises that each trial is checked against the float32 reference before and after it is timed;
one wrong answer makes the run fail, though it is finished and reported. Knows nothing of files and
terminals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.kernel.cases import Case, batches
from benchmarks.kernel.goals import GOALS, Comparison, compare, judge
from benchmarks.kernel.inputs import Inputs
from benchmarks.kernel.operators import BMC, Arena, CPUAttn, Operator, Sdpa, SlabPool, Trial
from benchmarks.kernel.rows import Row
from benchmarks.lib.answers import largest_error
from benchmarks.lib.ceilings import LARGEST_PRODUCT, Ceilings, read_bytes_for, threads_set
from benchmarks.lib.goals import Goal, Verdict, under_load
from benchmarks.lib.instruction_sets import best_of_machine
from benchmarks.lib.record import Machine, Record, Recorder
from benchmarks.lib.timing import Budget, Timing, TrialError, alternate
from benchmarks.lib.worker_client import WorkerError
from bmc_core import native
from bmc_core.costs.measure import Progress

SETS_OVER_L3 = 4
MEMORY_SHARE = 0.5
"""Share of the available memory that all rotating sets together may take."""
OUT_OF_TIME = "the quick list's seconds are over; --cases full has no limit"


class Selection(NamedTuple):
    """The options that the cases were chosen by."""

    cases: str = "quick"
    only: str | None = None
    dtype: str | None = None


QUICK = Selection()


@dataclasses.dataclass(frozen=True)
class Options:
    """A run.

    Attributes:
        seconds: time budget of one case, all operators together.
        limit: seconds of the whole run, so that the later cases get less, or nothing; None: none.
        selection: how `cases` were chosen, for the record.
        isa: instruction set forced on BMC and CPU_ATTN.
        sets_bytes, read_bytes, gemm_size: override what follows from the L3 cache, for tests, as
            do `goals` the file's, and `clock` the limit's.
    """

    cases: Sequence[Case]
    threads: int
    seconds: float = 3.0
    min_rounds: int = 5
    limit: float | None = None
    selection: Selection = QUICK
    isa: str | None = None
    pace_python: Path | None = None
    sets_bytes: int | None = None
    read_bytes: int | None = None
    gemm_size: int = LARGEST_PRODUCT
    goals: Sequence[Goal] = tuple(GOALS)
    clock: Callable[[], float] = time.monotonic


class Report(NamedTuple):
    """All that a run found out. `notes`: on the run as a whole; `remarks`: on single cases;
    `missing`: cases, or peers on a case, that were not measured."""

    record: Record
    options: Options
    notes: list[str]
    remarks: list[str]
    rows: list[Row]
    verdicts: list[Verdict]
    comparisons: list[Comparison]
    failures: list[str]
    missing: list[str]


def sets_target(machine: Machine, operators: int, notes: list[str]) -> int:
    """Bytes that one operator's rotating sets cover: four L3 caches, or what memory allows."""
    wanted = SETS_OVER_L3 * machine.l3_bytes
    allowed = int(MEMORY_SHARE * machine.available_bytes / operators)
    if not machine.l3_known:
        notes.append(
            f"The system does not tell its L3 cache; {machine.l3_bytes >> 20} MiB are assumed."
        )
    if wanted <= allowed:
        return wanted
    notes.append(
        f"Rotating sets cover {allowed / machine.l3_bytes:.1f} L3 caches per operator instead of "
        f"{SETS_OVER_L3}: capped at {MEMORY_SHARE:.0%} of the available memory."
    )
    return allowed


def open_operators(options: Options, target: int) -> list[Operator]:
    """BMC first, then its peers; closes what it opened if one is unusable."""
    largest = max(case.set_bytes for case in options.cases)
    operators: list[Operator] = []
    try:
        operators.append(BMC(Arena(target, largest, huge_pages=True)))
        operators.append(CPUAttn(Arena(target, largest), options.isa))
        operators.append(Sdpa(Arena(target, largest)))
        if options.pace_python is not None:
            operators.append(SlabPool(target, options.pace_python))
    except BaseException:
        for operator in operators:
            operator.close()
        raise
    return operators


def run(options: Options, tell: Progress = lambda text, fraction: None) -> Report:
    """Measures ceilings and cases.

    Raises:
        Unusable: an operator that was asked for cannot run here.
        ValueError: `isa` is not usable on this machine.
    """
    recorder = Recorder()
    budget = Budget(options.limit, options.clock)
    notes: list[str] = []
    count = 4 if options.pace_python else 3
    target = options.sets_bytes or sets_target(recorder.machine, count, notes)
    read_bytes = options.read_bytes or read_bytes_for(recorder.machine)
    ceilings = Ceilings(read_bytes, gemm_size=options.gemm_size)
    with contextlib.ExitStack() as stack:
        if options.isa is not None:
            stack.enter_context(native.forced_isa(options.isa))
            if options.isa == "portable":
                notes.append("CPU_ATTN has no portable build: its AVX2 build is timed.")
            best = best_of_machine()
            if options.isa != best:
                notes.append(
                    f"The ceiling of products is torch's, which uses {best}, not {options.isa}: "
                    "shares of it are small, and no code without those instructions reaches it."
                )
        stack.enter_context(threads_set(options.threads))
        tell("read bandwidth and GEMM rate", 0.0)
        for case in options.cases:
            ceilings.floor(1, 1, case.threads or options.threads, case.dtype)
        operators = open_operators(options, target)
        for operator in operators:
            stack.callback(operator.close)
        session = _Session(options, operators, ceilings, tell)
        session.measure(budget)
        for operator in operators:
            operator.close()
        tell("read bandwidth and GEMM rate again", 1.0)
        ceilings.measure_again()
        record = recorder.record(_peer_isa(operators))
    rows = [row.under(ceilings) for row in session.rows]
    notes += _notes(options, record, ceilings)
    comparisons = compare(rows)
    verdicts = under_load(
        judge(rows, comparisons, record.isas, options.goals), record.machine.others
    )
    return Report(
        record,
        options,
        notes,
        session.remarks,
        rows,
        verdicts,
        comparisons,
        session.failures,
        session.missing,
    )


def _peer_isa(operators: Sequence[Operator]) -> str:
    return next(operator.isa for operator in operators if operator.name == CPUAttn.name)


def _notes(options: Options, record: Record, ceilings: Ceilings) -> list[str]:
    """On the machine as it was during the run."""
    notes = []
    runtimes = record.machine.openmp
    if len(runtimes) > 1:
        notes.append(f"More than one OpenMP runtime is loaded: {', '.join(runtimes)}.")
    busy = record.busy_note()
    if busy is not None:
        notes.append(busy)
    read = ceilings.read(options.threads)
    notes.append(f"Read bandwidth: {read.rate:.1f} GB/s by {read.method}.")
    for dtype in dict.fromkeys(case.dtype for case in options.cases):
        ceiling = ceilings.gemm(options.threads, dtype)
        doubt = "" if ceiling.told else "; larger ones took too long to tell more"
        rate = f"{ceiling.rate:.0f}" if ceiling.rate >= 10 else f"{ceiling.rate:.2g}"
        notes.append(f"GEMM, {dtype}: {rate} GFLOP/s at {ceiling.method}{doubt}.")
    return notes


class _Session:
    """The loop over batches of cases."""

    def __init__(
        self, options: Options, operators: list[Operator], ceilings: Ceilings, tell: Progress
    ) -> None:
        self.options = options
        self.operators = operators
        self.ceilings = ceilings
        self.tell = tell
        self.rows: list[Row] = []
        self.remarks: list[str] = []
        self.failures: list[str] = []
        self.missing: list[str] = []

    def measure(self, budget: Budget) -> None:
        todo = batches(self.options.cases)
        for number, cases in enumerate(todo):
            if budget.is_spent():
                self.missing += [f"{case.name}: {OUT_OF_TIME}" for case in cases]
                continue
            self._batch(cases, number, len(todo), budget)
        self.tell("done", 1.0)

    def _batch(self, cases: list[Case], number: int, count: int, budget: Budget) -> None:
        """One case, or the cases of one group, on every operator that takes them: the batch
        `number` of `count`."""
        done = number / count
        text = cases[0].group or cases[0].name
        self.tell(f"{text}: preparing", done)
        prepared = self._prepare(cases)
        for operator in self.operators:
            same = [trial for other, trial, _ in prepared if other is operator]
            for place, trial in enumerate(same):
                trial.first_set = place * trial.sets // len(same)
        # Shared out now: what was slow to prepare is timed as often as the others.
        limit = budget.part(count - number)
        timings: list[Timing] = []
        while prepared and not timings:
            try:
                timings = alternate(
                    [trial for _, trial, _ in prepared],
                    self.options.seconds * max(1.0, len(cases) / 2),
                    min_rounds=self.options.min_rounds,
                    limit=limit,
                    tick=lambda fraction: self.tell(text, done + fraction / count),
                )
            except TrialError as error:  # the others once more, without it
                operator, trial, _ = prepared.pop(error.place)
                self._cannot(operator, trial.case, error.problem)
        for case in cases:
            calls = [t.calls for t, p in zip(timings, prepared, strict=True) if p[1].case is case]
            if calls and min(calls) < self.options.min_rounds:
                rounds = f"{min(calls)} of {self.options.min_rounds} rounds"
                self.missing.append(f"{case.name}: only {rounds}: {OUT_OF_TIME}")
        self._rows(self._checked(prepared, timings))

    def _checked(
        self, prepared: Sequence[tuple[Operator, Trial, float]], timings: Sequence[Timing]
    ) -> list[tuple[Operator, Trial, float, Timing]]:
        """What was right before may have been spoiled since: the larger error counts."""
        checked = []
        for (operator, trial, error), timing in zip(prepared, timings, strict=True):
            try:
                again = trial.check()
            except (RuntimeError, WorkerError) as problem:
                self._cannot(operator, trial.case, problem)
                continue
            checked.append((operator, trial, largest_error(error, again), timing))
        return checked

    def _rows(self, timed: Sequence[tuple[Operator, Trial, float, Timing]]) -> None:
        """The rows of a batch, each beside the others on its case."""
        torch.set_num_threads(self.options.threads)
        medians: dict[str, dict[str, float]] = {}
        for operator, trial, _, timing in timed:
            medians.setdefault(trial.case.name, {})[operator.title] = timing.ms
        for operator, trial, error, timing in timed:
            peers = {
                title: ms / timing.ms
                for title, ms in medians[trial.case.name].items()
                if title != operator.title
            }
            self._row(operator, trial, timing, error, peers)

    def _prepare(self, cases: list[Case]) -> list[tuple[Operator, Trial, float]]:
        """Each operator on each case, loaded, and the error of its first answer."""
        shared: dict[tuple[object, ...], Inputs] = {}
        prepared: list[tuple[Operator, Trial, float]] = []
        for case in cases:
            inputs = shared.get(case.inputs_key)
            if inputs is None or inputs.case.kind != case.kind:
                inputs = shared[case.inputs_key] = Inputs(case)
            for operator in self.operators:
                reason = operator.refusal(case)
                if reason is not None:
                    self.remarks.append(f"{case.name}: {operator.title} {reason}.")
                    continue
                try:
                    trial = operator.prepare(case, inputs, case.threads or self.options.threads)
                    error = trial.check()
                except (RuntimeError, WorkerError) as problem:
                    self._cannot(operator, case, problem)
                    continue
                trial.replicate()
                prepared.append((operator, trial, error))
                if trial.remark:
                    self.remarks.append(f"{case.name}: {operator.title} {trial.remark}.")
        return prepared

    def _cannot(self, operator: Operator, case: Case, problem: Exception) -> None:
        """A peer may refuse a shape, or end; BMC may not."""
        why = (str(problem) or type(problem).__name__).splitlines()[0]
        text = f"{case.name}: {operator.title} fails: {why}"
        (self.failures if operator.name == BMC.name else self.missing).append(text)

    def _row(
        self,
        operator: Operator,
        trial: Trial,
        timing: Timing,
        error: float,
        ratios: dict[str, float],
    ) -> None:
        case = trial.case
        allowed = case.tolerance(peer=operator.name != BMC.name)
        ok = error <= allowed
        if not ok:
            self.failures.append(
                f"{case.name}: {operator.title} is wrong: relative error {error:.2e}; allowed: "
                f"{allowed:.0e} for {case.dtype}"
            )
        side = (operator.name, operator.title, operator.isa, trial.threads)
        row = Row(case, *side, timing, trial.sets, error, ok, ratios)
        self.rows.append(row.under(self.ceilings))
