"""A whole decode step of vLLM: both engines alive, stepped in turns.

Measured in a worn KV pool with prefix caching on, as users run vLLM, and then in a virgin one.
Promises that both engines live at the same time in processes of their own with the same thread
binding; that both read rows written by their own backend; and that a side whose logits are not
finite, or are not the other's, makes the run fail. Knows nothing of files and terminals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.engines import VLLM, Settings, make
from benchmarks.engines.base import (
    WAKING_STEPS,
    Batch,
    Engine,
    Step,
    lacking_memory,
    take_turns,
)
from benchmarks.lib.answers import LOGIT_TOLERANCE, relative_error
from benchmarks.lib.ceilings import Ceilings, Floor, ceilings_of
from benchmarks.lib.goals import Goal, Verdict, holding, load, under_load
from benchmarks.lib.llama import RandomLlama
from benchmarks.lib.record import Record, Recorder
from benchmarks.lib.timing import Budget, Timing, summary
from benchmarks.step.cases import StepCase
from bmc_core.costs.measure import Progress
from bmc_core.machine.cpu import allowed_cpus, to_list_text

GOALS = load(Path(__file__).with_name("goals.toml"))
OURS, PEER = VLLM
WARM_STEPS = 2
WORN, VIRGIN = POOLS = ("worn", "virgin")
"""A pool that mixed requests have used through many times, as users' are; one that is new."""


@dataclass(frozen=True)
class Options:
    """A run: `rounds` turns of `steps` timed steps for each engine. `bind` is the value of
    VLLM_CPU_OMP_THREADS_BIND; `drawn`: see `vllm_worker.Worker.fill`; `pools`: of `POOLS`."""

    cases: Sequence[StepCase]
    bind: str
    rounds: int = 8
    steps: int = 6
    compile: bool = False
    drawn: bool = True
    pools: Sequence[str] = POOLS

    @property
    def settings(self) -> Settings:
        return Settings(bind=self.bind, compile=self.compile, drawn=self.drawn)

    def batch(self, case: StepCase) -> Batch:
        """Timed, waking, warming and checking steps included."""
        new_rows = self.rounds * (self.steps + WAKING_STEPS) + WARM_STEPS + 2
        return Batch(case.batch, case.rows, new_rows)


class Row(NamedTuple):
    """One engine on one case.

    Attributes:
        pool: one of `POOLS`.
        timing: of the decode steps.
        floor: what a step takes at least here.
        ratio: the other engine's median over this one's.
        logits_error: of this engine's first decode step, relative to CPU_ATTN's; NaN for itself.
        logits_error_after: of the step after the turns, over the sequences whose tokens were
            CPU_ATTN's until then; NaN where there is none.
        tokens_agree: share of the greedy tokens, up to each sequence's first difference, that
            are CPU_ATTN's.
    """

    case: StepCase
    pool: str
    system: str
    title: str
    peer: bool
    threads: int
    timing: Timing
    floor: Floor
    ratio: float
    logits_error: float
    logits_error_after: float
    tokens_agree: float


class Report(NamedTuple):
    """All that a run found out; `missing`: what could not be checked; `read_gb_s`: read bandwidth
    of as many threads."""

    record: Record
    options: Options
    rows: list[Row]
    failures: list[str]
    missing: list[str]
    verdicts: list[Verdict]
    read_gb_s: float


def default_bind() -> str:
    """All CPUs of the affinity mask."""
    return to_list_text(allowed_cpus())


def run(options: Options, tell: Progress = lambda text, fraction: None) -> Report:
    """Measures every case.

    Raises:
        WorkerError: an engine could not do what was asked.
        MemoryError: both engines do not fit.
    """
    recorder = Recorder()
    ceilings = ceilings_of(recorder.machine)
    rows: list[Row] = []
    failures: list[str] = []
    missing: list[str] = []
    for number, case in enumerate(options.cases):
        part = 1 / len(options.cases)

        def tell_part(text: str, done: float, case=case, number=number, part=part) -> None:
            tell(f"{case.name}: {text}", part * (number + done))

        one = _Case(case, options, ceilings, tell_part)
        rows += one.measure()
        failures += one.failures
        missing += one.missing
    tell("done", 1.0)
    record = recorder.record()
    goals = holding(GOALS, record.isas)
    verdicts = under_load(judge(rows, goals), record.machine.others)
    read = ceilings.read(rows[0].threads).rate
    return Report(record, options, rows, failures, missing, verdicts, read)


class _Case:
    """Both engines on one case."""

    def __init__(
        self, case: StepCase, options: Options, ceilings: Ceilings, tell: Progress
    ) -> None:
        self.case, self.options, self.ceilings, self.tell = case, options, ceilings, tell
        self.failures: list[str] = []
        self.missing: list[str] = []

    def measure(self) -> list[Row]:
        case, batch = self.case, self.options.batch(self.case)
        engines = {name: make(name, self.options.settings) for name in VLLM}
        lacking = lacking_memory(engines, case.shape, batch, batch)
        if lacking is not None:
            raise MemoryError(f"{case.name}: {lacking}; leave the case out with --only")
        with ExitStack() as stack:
            for engine in engines.values():
                stack.callback(engine.close)
            self._start(engines, batch, stack)
            rows: list[Row] = []
            # The virgin pool first: it is one only once.
            for pool in sorted(self.options.pools, key=POOLS.index, reverse=True):
                rows = self._measure(pool, engines, batch) + rows
        return rows

    def _measure(self, pool: str, engines: dict[str, Engine], batch: Batch) -> list[Row]:
        for engine in engines.values():
            self.tell(f"{engine.title}: {batch.sequences} x {batch.rows} rows, {pool} pool", 0.65)
            if pool == WORN:
                engine.wear()
            engine.fill(batch)
        logits = {name: self._logits(engine) for name, engine in engines.items()}
        for engine in engines.values():
            engine.step(WARM_STEPS)
        steps, _ = take_turns(
            engines,
            self.options.rounds,
            lambda engine: self.options.steps,
            Budget(None),
            lambda done: self.tell(f"stepping in turns, {pool} pool", 0.65 + 0.35 * done),
        )
        tokens = {name: engine.tokens() for name, engine in engines.items()}
        after = {name: self._logits(engine) for name, engine in engines.items()}
        for engine in engines.values():
            engine.empty()
        return self._rows(pool, engines, (logits, after), steps, tokens)

    def _start(self, engines: dict[str, Engine], batch: Batch, stack: ExitStack) -> None:
        self.tell("writing the model", 0.0)
        model = RandomLlama(self.case.shape, batch.rows + batch.new_rows + 128)
        stack.callback(model.close)
        for place, engine in enumerate(engines.values()):
            self.tell(f"{engine.title}: starting", 0.05 + 0.3 * place)
            engine.start(model, batch)

    def _logits(self, engine: Engine) -> torch.Tensor:
        logits = engine.logits()
        if not bool(torch.isfinite(logits).all()):
            self.failures.append(
                f"{self.case.name}: {engine.title} gives logits that are not finite"
            )
        return logits

    def _rows(
        self,
        pool: str,
        engines: dict[str, Engine],
        logits: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
        steps: dict[str, list[Step]],
        tokens: dict[str, list[list[int]]],
    ) -> list[Row]:
        case = self.case
        threads = {name: engine.threads for name, engine in engines.items()}
        if len(set(threads.values())) > 1:
            self.failures.append(f"{case.name}: the engines have {threads} threads")
        self.tell("ceilings", 1.0)
        shape = case.shape
        work = shape.step_bytes(case.batch, case.rows), shape.step_flops(case.batch, case.rows)
        floor = self.ceilings.floor(*work, threads[OURS], shape.dtype)
        timings = {name: summary([step.seconds for step in done]) for name, done in steps.items()}
        rows = []
        for name, engine in engines.items():
            other = OURS if name == PEER else PEER
            error = after = math.nan
            if name != PEER:
                error, after = self._errors(engine, logits, tokens)
            ratio = timings[other].ms / timings[name].ms
            agree = agreement(tokens[name], tokens[PEER])
            side = (engine.name, engine.title, engine.peer, threads[name])
            rows.append(Row(case, pool, *side, timings[name], floor, ratio, error, after, agree))
        return rows

    def _errors(
        self,
        engine: Engine,
        logits: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
        tokens: dict[str, list[list[int]]],
    ) -> tuple[float, float]:
        """Before the turns, and after them; what follows other tokens cannot be compared."""
        before, after = ((found[engine.name], found[PEER]) for found in logits)
        pairs = zip(tokens[engine.name], tokens[PEER], strict=True)
        same = torch.tensor([ours == theirs for ours, theirs in pairs])
        errors = {"before": relative_error(*before)}
        if same.any():
            errors["after"] = relative_error(*(found[same] for found in after))
        else:
            self.missing.append(
                f"{self.case.name}: {engine.title}'s logits after the turns: no sequence has "
                "CPU_ATTN's tokens until there"
            )
        for when, error in errors.items():
            if not error <= LOGIT_TOLERANCE:
                self.failures.append(
                    f"{self.case.name}: {engine.title}'s logits differ from CPU_ATTN's by "
                    f"{error:.1e} {when} the turns; allowed: {LOGIT_TOLERANCE}"
                )
        return errors["before"], errors.get("after", math.nan)


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """Share of the tokens before each sequence's first difference."""
    same = total = 0
    for ours, theirs in zip(tokens, reference, strict=True):
        total += min(len(ours), len(theirs))
        for a, b in zip(ours, theirs, strict=False):
            if a != b:
                break
            same += 1
    return same / total if total else 1.0


def judge(rows: Sequence[Row], goals: Sequence[Goal]) -> list[Verdict]:
    """Each goal of a case that was measured; no step is faster than the floor."""
    found = {(row.case.name, row.system): row for row in reversed(rows)}  # worn before virgin
    verdicts = []
    for goal in goals:
        row = found.get((goal.case, goal.system))
        peer = found.get((goal.case, goal.against))
        if row is None or peer is None:
            verdicts.append(Verdict(goal.case, goal, None))
            continue
        at_floor = peer.timing.ms / row.floor.ms
        verdicts.append(Verdict(goal.case, goal, row.ratio, at_floor, row.floor.told))
    return verdicts
