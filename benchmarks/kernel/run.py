"""`python -m benchmarks kernel`: BMC and its peers on every case, in turns, under two ceilings.

Promises that each trial is checked against the float32 reference before and after it is timed;
one wrong answer makes the run fail, though it is finished and reported. Knows nothing of files and
terminals.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.kernel.cases import Case, Goal, batches
from benchmarks.kernel.inputs import Inputs
from benchmarks.kernel.operators import BMC, Arena, CPUAttn, Sdpa, SlabPool, System, Trial
from benchmarks.lib.ceilings import (
    MIN_READ_BYTES,
    Ceilings,
    Machine,
    describe,
    threads_set,
    versions,
)
from benchmarks.lib.timing import Timing, alternate
from benchmarks.lib.worker_client import WorkerError
from bmc_core.costs.measure import Progress
from bmc_core.machine import openmp
from bmc_core.machine.load import BUSY, Neighbors

SETS_OVER_L3 = 4
MEMORY_SHARE = 0.5
"""Share of the available memory that all rotating sets together may take."""
EFFICIENT_READ_SHARE = 0.85
"""From this share of the read bandwidth on, more threads need not be faster."""


@dataclasses.dataclass(frozen=True)
class Options:
    """A run. `seconds` is the time budget of one case, all systems together; `sets_bytes` and
    `read_bytes` override what follows from the L3 cache (for tests), as does `gemm_size`."""

    cases: Sequence[Case]
    threads: int
    seconds: float = 3.0
    min_rounds: int = 5
    isa: str | None = None
    pace_python: Path | None = None
    sets_bytes: int | None = None
    read_bytes: int | None = None
    gemm_size: int = 4096


class Row(NamedTuple):
    """One system on one case.

    Attributes:
        timing: of the calls.
        sets, set_bytes: rotating sets and the bytes of K and V in each.
        gb_s: KV bytes over the median, 1e9 bytes per second.
        gflops: floating-point operations over the median, 1e9 per second; 0 for a write.
        read_gb_s, gemm_gflops: ceilings at the same threads (and dtype).
        error: relative to the float32 reference, the larger of before and after; `ok`: allowed.
        ratios: title of a peer -> its median over this one's.
    """

    case: Case
    system: str
    title: str
    isa: str
    threads: int
    timing: Timing
    sets: int
    set_bytes: int
    gb_s: float
    gflops: float
    read_gb_s: float
    gemm_gflops: float
    error: float
    ok: bool
    ratios: dict[str, float]

    @property
    def share(self) -> float | None:
        """Of the ceiling that binds this kind of case; None for a write."""
        if self.case.kind == "write":
            return None
        if self.case.reads_bound:
            return self.gb_s / self.read_gb_s
        return self.gflops / self.gemm_gflops


class Verdict(NamedTuple):
    """A goal held against what was measured; `value` None: not measured in this run."""

    case: str
    goal: Goal
    value: float | None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.goal.met_by(self.value)


class Comparison(NamedTuple):
    """A system on the cases of one group: median and smallest times in the order of the cases."""

    group: str
    title: str
    names: list[str]
    ms: list[float]
    best: list[float]

    @property
    def spread(self) -> float:
        """Largest over smallest time, less 1."""
        return max(self.ms) / min(self.ms) - 1

    @property
    def best_spread(self) -> float:
        """The same of the smallest times: what is left of it where others use the machine."""
        return max(self.best) / min(self.best) - 1


class Report(NamedTuple):
    """All that a run found out."""

    machine: Machine
    versions: dict[str, str]
    notes: list[str]
    remarks: list[str]
    rows: list[Row]
    verdicts: list[Verdict]
    comparisons: list[Comparison]
    failures: list[str]


def _nobody(text: str, fraction: float) -> None:
    pass


def sets_target(machine: Machine, systems: int, notes: list[str]) -> int:
    """Bytes that one system's rotating sets cover: four L3 caches, or what memory allows."""
    wanted = SETS_OVER_L3 * machine.l3_bytes
    allowed = int(MEMORY_SHARE * machine.available_bytes / systems)
    if not machine.l3_known:
        notes.append(
            f"The system does not tell its L3 cache; {machine.l3_bytes >> 20} MiB are assumed."
        )
    if wanted <= allowed:
        return wanted
    notes.append(
        f"Rotating sets cover {allowed / machine.l3_bytes:.1f} L3 caches per system instead of "
        f"{SETS_OVER_L3}: capped at {MEMORY_SHARE:.0%} of the available memory."
    )
    return allowed


def open_systems(options: Options, target: int) -> list[System]:
    """BMC first, then its peers; closes what it opened if one is unusable."""
    largest = max(case.set_bytes for case in options.cases)
    systems: list[System] = []
    try:
        systems.append(BMC(Arena(target, largest, huge_pages=True)))
        systems.append(CPUAttn(Arena(target, largest), options.isa))
        systems.append(Sdpa(Arena(target, largest)))
        if options.pace_python is not None:
            systems.append(SlabPool(target, options.pace_python))
    except BaseException:
        for system in systems:
            system.close()
        raise
    return systems


def run(options: Options, tell: Progress = _nobody) -> Report:
    """Measures ceilings and cases.

    Raises:
        Unusable: a system that was asked for cannot run here.
        ValueError: `isa` is not usable on this machine.
    """
    machine = describe()
    neighbors = Neighbors()
    notes: list[str] = []
    count = 4 if options.pace_python else 3
    target = options.sets_bytes or sets_target(machine, count, notes)
    read_bytes = options.read_bytes or max(MIN_READ_BYTES, target)
    ceilings = Ceilings(read_bytes, gemm_size=options.gemm_size)
    with contextlib.ExitStack() as stack:
        if options.isa is not None:
            from bmc_core import native

            stack.enter_context(native.forced_isa(options.isa))
            if options.isa == "portable":
                notes.append("CPU_ATTN has no portable build: its AVX2 build is timed.")
        stack.enter_context(threads_set(options.threads))
        tell("read bandwidth and GEMM rate", 0.0)
        for case in options.cases:
            threads = case.threads or options.threads
            ceilings.read(threads)
            ceilings.gemm(threads, case.dtype)
        systems = open_systems(options, target)
        for system in systems:
            stack.callback(system.close)
        session = _Session(options, systems, ceilings, tell)
        session.measure()
        for system in systems:
            system.close()
        tell("read bandwidth again", 1.0)
        ceilings.measure_again()
    rows = [row._replace(read_gb_s=ceilings.read(row.threads).rate) for row in session.rows]
    machine = machine._replace(openmp=openmp.runtimes(), others=neighbors.share())
    if len(machine.openmp) > 1:
        notes.append(f"More than one OpenMP runtime is loaded: {', '.join(machine.openmp)}.")
    if machine.others is not None and machine.others > BUSY:
        notes.append(
            f"Other processes took {machine.others:.0%} of the cores during the run: the figures "
            "are too low, and those of short calls most."
        )
    read = ceilings.read(options.threads)
    notes.append(f"Read bandwidth: {read.rate:.1f} GB/s by {read.method}.")
    for (threads, dtype), ceiling in ceilings.gemms.items():
        if threads == options.threads:
            notes.append(f"GEMM, {dtype}: {ceiling.rate:.0f} GFLOP/s at {ceiling.method}.")
    comparisons = compare(rows)
    return Report(
        machine,
        versions(),
        notes,
        session.remarks,
        rows,
        judge(rows, comparisons),
        comparisons,
        session.failures,
    )


class _Session:
    """The loop over batches of cases."""

    def __init__(
        self, options: Options, systems: list[System], ceilings: Ceilings, tell: Progress
    ) -> None:
        self.options = options
        self.systems = systems
        self.ceilings = ceilings
        self.tell = tell
        self.rows: list[Row] = []
        self.remarks: list[str] = []
        self.failures: list[str] = []

    def measure(self) -> None:
        todo = batches(self.options.cases)
        for number, cases in enumerate(todo):
            self._batch(cases, number / len(todo), 1 / len(todo))
        self.tell("done", 1.0)

    def _batch(self, cases: list[Case], done: float, part: float) -> None:
        """One case, or the cases of one group, on every system that takes them."""
        text = cases[0].group or cases[0].name
        self.tell(f"{text}: preparing", done)
        shared: dict[tuple[object, ...], Inputs] = {}
        trials: list[tuple[System, Trial, Case]] = []
        errors: list[float] = []
        for case in cases:
            inputs = shared.get(case.inputs_key)
            if inputs is None or inputs.case.kind != case.kind:
                inputs = shared[case.inputs_key] = Inputs(case)
            for system in self.systems:
                reason = system.refusal(case)
                if reason is not None:
                    self.remarks.append(f"{case.name}: {system.title} {reason}.")
                    continue
                try:
                    trial = system.prepare(case, inputs, case.threads or self.options.threads)
                    error = trial.check()
                except (RuntimeError, WorkerError) as problem:
                    self._cannot(system, case, problem)
                    continue
                trial.spread()
                errors.append(error)
                trials.append((system, trial, case))
                if trial.remark:
                    self.remarks.append(f"{case.name}: {system.title} {trial.remark}.")
        for system in self.systems:
            same = [trial for other, trial, _ in trials if other is system]
            for number, trial in enumerate(same):
                trial.first_set = number * trial.sets // len(same)
        budget = self.options.seconds * max(1.0, len(cases) / 2)
        timings = alternate(
            [trial for _, trial, _ in trials],
            budget,
            min_rounds=self.options.min_rounds,
            tick=lambda fraction: self.tell(text, done + part * fraction),
        )
        for place, (_, trial, _) in enumerate(trials):
            errors[place] = max(errors[place], trial.check())
        torch.set_num_threads(self.options.threads)
        medians: dict[str, dict[str, float]] = {case.name: {} for case in cases}
        for (system, _, case), timing in zip(trials, timings, strict=True):
            medians[case.name][system.title] = timing.ms
        for (system, trial, case), timing, error in zip(trials, timings, errors, strict=True):
            peers = {k: v / timing.ms for k, v in medians[case.name].items() if k != system.title}
            self._row(system, trial, case, timing, error, peers)

    def _cannot(self, system: System, case: Case, problem: Exception) -> None:
        """A peer may refuse a shape; BMC may not."""
        text = f"{case.name}: {system.title} fails: {str(problem).splitlines()[0]}"
        (self.failures if system.name == BMC.name else self.remarks).append(text)

    def _row(
        self,
        system: System,
        trial: Trial,
        case: Case,
        timing: Timing,
        error: float,
        ratios: dict[str, float],
    ) -> None:
        allowed = case.tolerance(peer=system.name != BMC.name)
        ok = error <= allowed
        if not ok:
            self.failures.append(
                f"{case.name}: {system.title} is wrong: relative error {error:.2e}; allowed: "
                f"{allowed:.0e} for {case.dtype}"
            )
        self.rows.append(
            Row(
                case=case,
                system=system.name,
                title=system.title,
                isa=system.isa,
                threads=trial.threads,
                timing=timing,
                sets=trial.sets,
                set_bytes=case.set_bytes,
                gb_s=case.kv_bytes / timing.ms / 1e6,
                gflops=case.flops / timing.ms / 1e6,
                read_gb_s=self.ceilings.read(trial.threads).rate,
                gemm_gflops=self.ceilings.gemm(trial.threads, case.dtype).rate,
                error=error,
                ok=ok,
                ratios=ratios,
            )
        )


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """One comparison per group and system, in the order of the rows."""
    found: dict[tuple[str, str], Comparison] = {}
    for row in rows:
        if not row.case.group:
            continue
        key = (row.case.group, row.title)
        comparison = found.setdefault(key, Comparison(*key, [], [], []))
        comparison.names.append(row.case.name)
        comparison.ms.append(row.timing.ms)
        comparison.best.append(row.timing.best)
    return list(found.values())


def judge(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Every goal of the cases that BMC was timed on."""
    ours = {row.case.name: row for row in rows if row.system == BMC.name}
    spreads = {c.group: c.spread for c in comparisons if c.title == BMC.title}
    verdicts: list[Verdict] = []
    told: set[str] = set()
    for row in ours.values():
        for goal in row.case.goals:
            if goal.metric == "spread":
                if row.case.group not in told:
                    told.add(row.case.group)
                    verdicts.append(Verdict(row.case.group, goal, spreads[row.case.group]))
                continue
            verdicts.append(Verdict(row.case.name, goal, _value(goal, row, ours)))
    return verdicts


def _value(goal: Goal, row: Row, ours: dict[str, Row]) -> float | None:
    if goal.metric == "read_share":
        return row.gb_s / row.read_gb_s
    if goal.metric == "gflops":
        return row.gflops
    if goal.metric == "ratio":
        return row.ratios.get(goal.against)
    if goal.metric == "cost":
        other = ours.get(goal.against)
        return None if other is None else row.timing.ms / other.timing.ms
    if goal.metric == "parts":
        parts = [r for r in ours.values() if r.case.group == row.case.group and r is not row]
        return row.timing.ms / sum(r.timing.ms for r in parts) if parts else None
    alone = next(
        (r for r in ours.values() if r.case.group == row.case.group and r.threads == 1), None
    )
    if alone is None:
        return None
    efficiency = alone.timing.ms / (row.threads * row.timing.ms)
    if row.case.reads_bound and row.gb_s / row.read_gb_s >= EFFICIENT_READ_SHARE:
        return max(efficiency, goal.bound)  # the bandwidth is reached
    return efficiency
