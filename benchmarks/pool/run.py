"""A KV pool over many turnovers, under vLLM's scheduler and BMC's, without a model.

A turnover is as many newly computed rows as the pool has. Promises that every system gets requests
drawn in the same way, that systems take turns, a turnover each, and that the pool and the block
tables never contradict each other. Admissions run on both sides until the last request has ended;
BMC needs as many steps and preemptions as vLLM with the same blocks, or the run fails. Knows
nothing of files and terminals.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput

from benchmarks.lib.goals import Goal, Verdict, holding, load, under_load
from benchmarks.lib.load import Load, Requests
from benchmarks.lib.record import Record, Recorder
from benchmarks.pool.attention import Tables, slower
from benchmarks.pool.cases import ADMISSIONS, Admission, System
from benchmarks.pool.scheduling import served
from bmc_core.costs.measure import Progress
from bmc_vllm.scheduler import BMCScheduler

GOALS = load(Path(__file__).with_name("goals.toml"))
LOOK_STEPS = 20
"""Steps between two looks at the block tables."""
ATTENTION_SECONDS = 4.0
CHECK_TURNOVERS = 4
"""Turnovers between two full checks of the pool."""


@dataclass(frozen=True)
class Options:
    """A run. `systems`: BMC first, then vLLM with the same blocks."""

    loads: Sequence[Load]
    systems: Sequence[System]
    turnovers: int = 12
    seed: int = 0


class Turnover(NamedTuple):
    """One turnover of one system's pool.

    Attributes:
        growths: of requests that decode, by chunks (vLLM: by blocks), per 1000 decoded tokens.
        adjacent: share of neighbors in block tables that are neighbors in the pool.
        stretch: rows that lie side by side, on average.
        spare: rows per request beyond those that hold a token, with those it would grow into.
        hits: share of the prompts' tokens that the prefix cache had.
        microseconds: median of a step's scheduling.
        preempted: requests.
    """

    growths: float
    adjacent: float
    stretch: float
    spare: float
    hits: float
    microseconds: float
    preempted: int


class Row(NamedTuple):
    """One system under one load, turnover by turnover.

    Attributes:
        hits: over all turnovers.
        attention: time of BMC's decode attention over the last block tables, over that of the same
            rows in one stretch a request.
    """

    load: Load
    system: System
    turnovers: list[Turnover]
    hits: float
    attention: float

    @property
    def worn(self) -> Turnover:
        """Median over the second half of the turnovers."""
        late = self.turnovers[len(self.turnovers) // 2 :]
        return Turnover(*(statistics.median(figures) for figures in zip(*late, strict=True)))


class Admitted(NamedTuple):
    """How one system got through an admission."""

    admission: Admission
    system: str
    steps: int
    most_running: int
    preempted: int


class Report(NamedTuple):
    """All that a run found out."""

    record: Record
    options: Options
    rows: list[Row]
    admitted: list[Admitted]
    failures: list[str]
    verdicts: list[Verdict]


def run(options: Options, tell: Progress = lambda text, fraction: None) -> Report:
    """Serves every load."""
    recorder = Recorder()
    rows: list[Row] = []
    admitted, failures = _admissions(options.systems)
    parts = len(options.loads)
    for place, one in enumerate(options.loads):

        def tell_part(text: str, done: float, one=one, place=place) -> None:
            tell(f"{one.name}: {text}", (place + done) / parts)

        rows += _serve(one, options, tell_part)
    tell("done", 1.0)
    record = recorder.record()
    verdicts = judge(rows, holding(GOALS, record.isas))
    return Report(
        record, options, rows, admitted, failures, under_load(verdicts, record.machine.others)
    )


def _serve(one: Load, options: Options, tell: Progress) -> list[Row]:
    worn = [_Worn(one, system, options.seed) for system in options.systems]
    for turn in range(options.turnovers):
        for place, pool in enumerate(worn):
            done = (turn + place / len(worn)) / options.turnovers
            tell(f"{pool.system.title}, turnover {turn + 1}", done)
            pool.turn_over()
            if turn % CHECK_TURNOVERS == 0:
                pool.check()
    tell("attention over the block tables", 1.0)
    attention = slower([pool.tables() for pool in worn], ATTENTION_SECONDS)
    return [pool.row(times) for pool, times in zip(worn, attention, strict=True)]


class _Worn:
    """One system's pool under one load."""

    def __init__(self, one: Load, system: System, seed: int) -> None:
        self.load, self.system = one, system
        self.num_blocks = one.pool_rows // system.block_size + 1
        self.served = served(system, one.requests, one.max_rows, self.num_blocks, one.caching)
        self.requests = Requests(one, seed)
        self.turnovers: list[Turnover] = []
        self.asked = self.hit = 0
        self._last: dict[str, int] = {}

    def turn_over(self) -> None:
        scheduler = self.served.scheduler
        self._computed = self._decoded = self._growths = 0
        self._pairs = self._adjacent = self._stretches = self._held = 0
        spare: list[float] = []
        seconds: list[float] = []
        before = self.served.preempted
        steps = asked = hit = 0
        while self._computed < self.load.pool_rows:
            while len(scheduler.running) + len(scheduler.waiting) < self.load.requests:
                self.served.add(*self.requests.draw())
            output = self.served.step()
            self._count(output)
            for request in self.served.ended:
                self._last.pop(request.request_id, None)
                self.requests.ended(request.all_token_ids)
            stats = self.served.stats
            if stats is not None:
                asked += stats.prefix_cache_stats.queries
                hit += stats.prefix_cache_stats.hits
            if not output.scheduled_new_reqs:
                seconds.append(self.served.seconds)
            steps += 1
            if steps % LOOK_STEPS == 0:
                spare.append(self._look())
        self.asked, self.hit = self.asked + asked, self.hit + hit
        self.turnovers.append(
            Turnover(
                1000 * self._growths / max(1, self._decoded),
                self._adjacent / max(1, self._pairs),
                self._held * self.system.block_size / max(1, self._stretches),
                statistics.fmean(spare) if spare else 0.0,
                hit / max(1, asked),
                1e6 * statistics.median(seconds),
                self.served.preempted - before,
            )
        )

    def _count(self, output: SchedulerOutput) -> None:
        """Rows that were computed, and chunks that decoding requests began."""
        self._computed += output.total_num_scheduled_tokens
        chunk = self.system.chunk_blocks
        for new in output.scheduled_new_reqs:
            self._last[new.req_id] = new.block_ids[0][-1]
        cached = output.scheduled_cached_reqs
        for name, groups in zip(cached.req_ids, cached.new_block_ids, strict=True):
            decodes = output.num_scheduled_tokens[name] == 1
            self._decoded += decodes
            for block in groups[0] if groups else ():
                begun = (block - 1) // chunk != (self._last[name] - 1) // chunk
                self._growths += decodes and begun
                self._last[name] = block

    def _look(self) -> float:
        """Counts neighbors in all block tables; returns the spare rows per request."""
        scheduler = self.served.scheduler
        used = 0
        for request in scheduler.running:
            (ids,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
            adjacent = sum(b == a + 1 for a, b in pairwise(ids))
            self._pairs += max(0, len(ids) - 1)
            self._adjacent += adjacent
            self._stretches += len(ids) - adjacent
            self._held += len(ids)
            used += len(ids) * self.system.block_size - request.num_computed_tokens
        if isinstance(scheduler, BMCScheduler):
            used = scheduler.growth_stats().rows_spare
        return used / max(1, len(scheduler.running))

    def check(self) -> None:
        """Raises IntegrityError where the pool and the block tables contradict each other."""
        if isinstance(self.served.scheduler, BMCScheduler):
            self.served.scheduler.check_integrity()

    def tables(self) -> Tables:
        scheduler = self.served.scheduler
        running = [r for r in scheduler.running if r.num_computed_tokens]
        manager = scheduler.kv_cache_manager
        return Tables(
            [manager.get_block_ids(request.request_id)[0] for request in running],
            [request.num_computed_tokens for request in running],
            self.system.block_size,
            self.num_blocks,
        )

    def row(self, attention: float) -> Row:
        hits = self.hit / max(1, self.asked)
        return Row(self.load, self.system, self.turnovers, hits, attention)


def _admissions(systems: Sequence[System]) -> tuple[list[Admitted], list[str]]:
    admitted: list[Admitted] = []
    failures: list[str] = []
    bmc, stock = systems[:2]
    for one in ADMISSIONS:
        chunk = bmc.chunk_blocks * one.block_size
        ours = _admit(one, bmc.name, System("", "", one.block_size, chunk))
        theirs = _admit(one, stock.name, System("", "", one.block_size))
        admitted += [ours, theirs]
        if ours[2:] != theirs[2:]:
            failures.append(
                f"{one}: {ours.steps} steps, {ours.most_running} running, {ours.preempted} "
                f"preempted with BMC; vLLM: {theirs.steps}, {theirs.most_running}, "
                f"{theirs.preempted}"
            )
    return admitted, failures


def _admit(one: Admission, name: str, system: System) -> Admitted:
    pool = served(system, 256, 2048, one.blocks, caching=False)
    for _ in range(one.requests):
        pool.add([1] * one.prompt, one.outputs)
    steps = most = 0
    while pool.scheduler.has_unfinished_requests():
        pool.step()
        steps += 1
        most = max(most, len(pool.scheduler.running) + len(pool.ended))
    return Admitted(one, name, steps, most, pool.preempted)


def judge(rows: Sequence[Row], goals: Sequence[Goal]) -> list[Verdict]:
    """Each goal of a load that was served."""
    found = {(row.load.name, row.system.name): row for row in rows}
    verdicts = []
    for goal in goals:
        ours = found.get((goal.case, goal.system))
        theirs = found.get((goal.case, goal.against)) if goal.against else ours
        value = None if ours is None or theirs is None else _figure(goal.metric, ours, theirs)
        verdicts.append(Verdict(goal.case, goal, value))
    return verdicts


def _figure(metric: str, ours: Row, theirs: Row) -> float | None:
    if metric == "hits":
        return ours.hits / theirs.hits if theirs.hits else None
    if metric == "scheduling":
        return ours.worn.microseconds / theirs.worn.microseconds
    if metric == "attention":
        return ours.attention
    return float(getattr(ours.worn, metric))
