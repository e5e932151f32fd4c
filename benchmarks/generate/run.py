"""A decode step of Hugging Face generation, BMC and its peers in turns.

Promises that all engines step in turns over the same weights and the same rows, and that one whose
logits or greedy tokens are not those of the cache that it replaces makes the run fail: that cache
is asked, but not timed, where it was not chosen. What BMC
pays for growing is part of its figure: each case's rows end shortly before a growth, so that one
falls among the timed steps, and its extra time is spread over the r steps that it serves. Knows
nothing of how an engine works.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.engines import HUGGING_FACE, Settings, make
from benchmarks.engines.base import (
    WAKING_STEPS,
    Batch,
    Engine,
    Step,
    Turns,
    lacking_memory,
    take_turns,
)
from benchmarks.generate.cases import FULL, GRID, GenerateCase
from benchmarks.lib.answers import LOGIT_TOLERANCE, relative_error
from benchmarks.lib.ceilings import Ceilings, Floor, ceilings_of, threads_set
from benchmarks.lib.goals import Goal, Verdict, holding, load, under_load
from benchmarks.lib.llama import MHA, TINY, LlamaShape, RandomLlama, drawn_tokens
from benchmarks.lib.record import Record, Recorder
from benchmarks.lib.timing import Budget, Timing, summary
from bmc_core.costs.measure import Progress

GOALS = load(Path(__file__).with_name("goals.toml"))
SPARE_ROWS = 6
"""Rows that fit before the growth that is timed."""
WARM_STEPS = 2
PEER_STEPS, BMC_STEPS = 2, 6
"""Steps of a turn: BMC's must also grow."""
TOKENS_OF = "dynamic"
"""The engine whose greedy float32 tokens all must have."""
OUT_OF_TIME = "the quick list's seconds are over; --cases full has no limit"


@dataclass(frozen=True)
class Options:
    """A run: `rounds` turns of two steps of a peer and six of BMC.

    Attributes:
        r: rows per growth.
        seconds: for all cases, so that the later ones get fewer rounds, or none; None: no limit.
        llama_cpp_python: interpreter with llama-cpp-python, for llama.cpp as one more engine.
    """

    cases: Sequence[GenerateCase]
    threads: int
    systems: Sequence[str] = HUGGING_FACE
    r: int = 128
    rounds: int = 5
    shape: LlamaShape = field(default=MHA)
    llama_cpp_python: Path | None = None
    seconds: float | None = None

    @property
    def settings(self) -> Settings:
        return Settings(self.threads, self.r, self.llama_cpp_python)

    @property
    def engines(self) -> tuple[str, ...]:
        return (*self.systems, *(["llama_cpp"] if self.llama_cpp_python else []))

    def batch(self, case: GenerateCase) -> Batch:
        """The case's rows, moved to where a chunk is almost full."""
        rows = max(1, round(case.rows / self.r)) * self.r - min(SPARE_ROWS, self.r - 1)
        return Batch(case.batch, rows, (BMC_STEPS + WAKING_STEPS) * self.rounds + WARM_STEPS + 1)


class Row(NamedTuple):
    """One engine on one case.

    Attributes:
        rows: per sequence when timing starts.
        timing: of the steps without a growth.
        growth_ms: what a step with a growth took longer; 0 where none was seen.
        step_ms: median step plus its share of a growth.
        floor: what a step takes at least here.
        rounds: turns that it had.
        logits_error: of the step before the turns or of the one after them, whichever is larger,
            relative to those of the engine's reference (DynamicCache, or the peer, where that
            computes otherwise) after the same tokens; NaN for a reference itself.
        copied_mb, reserved_mb: counted by the cache; NaN where it does not count.
    """

    case: GenerateCase
    rows: int
    system: str
    title: str
    peer: bool
    rounds: int
    timing: Timing
    growth_ms: float
    step_ms: float
    floor: Floor
    logits_error: float
    copied_mb: float
    reserved_mb: float


class Report(NamedTuple):
    """All that a run found out. `missing`: why an engine or a case was not measured; `read_gb_s`:
    read bandwidth."""

    record: Record
    options: Options
    rows: list[Row]
    failures: list[str]
    missing: list[str]
    verdicts: list[Verdict]
    read_gb_s: float


def run(options: Options, tell: Progress = lambda text, fraction: None) -> Report:
    """Measures every case.

    Raises:
        WorkerError: `Options.llama_cpp_python` does not do.
    """
    recorder = Recorder()
    ceilings = ceilings_of(recorder.machine)
    budget = Budget(options.seconds)
    with threads_set(options.threads):
        tell("greedy tokens of a small model", 0.0)
        failures = check_tokens(options)
        tell("ceilings", 0.01)
        ceilings.floor(1, 1, options.threads, options.shape.dtype)
        tell("building the model", 0.02)
        engines, missing = made(options)
        session = _Session(options, engines, ceilings, missing, failures)
        cases = session.fitting()
        if cases:
            largest = Batch(*map(max, zip(*map(options.batch, cases), strict=True)))
            model = RandomLlama(options.shape, largest.rows + largest.new_rows + options.r + 1)
            with started(engines, model, largest):
                session.measure(cases, budget, tell)
    tell("done", 1.0)
    record = recorder.record()
    goals = holding(GOALS, record.isas)
    verdicts = under_load(judge(session.rows, goals), record.machine.others)
    read = ceilings.read(options.threads).rate
    return Report(record, options, session.rows, failures, missing, verdicts, read)


def made(options: Options, also: Sequence[str] = ()) -> tuple[dict[str, Engine], list[str]]:
    """All engines that can run here, not started, and why others cannot: those that were chosen,
    the references of their logits, and `also`."""
    engines: dict[str, Engine] = {}
    missing = []
    names = list(dict.fromkeys((*options.engines, *also)))
    for name in names:
        try:
            engines[name] = make(name, options.settings)
        except ImportError as error:
            missing.append(f'{name}: {error}; pip install "bmc-llm[{extra(name)}]"')
        else:
            if engines[name].reference not in names:
                names.append(engines[name].reference)
    return engines, missing


def extra(name: str) -> str:
    """The extra of bmc-llm that has what an engine needs."""
    return "deepspeed" if "deepspeed" in name else "transformers"


@contextmanager
def started(engines: Mapping[str, Engine], model: RandomLlama, largest: Batch) -> Iterator[None]:
    """The engines with the model in them; closed at the end, also after an error."""
    try:
        for engine in engines.values():
            engine.start(model, largest)
        yield
    finally:
        for engine in engines.values():
            engine.close()
        model.close()


def check_tokens(options: Options, new: int = 40) -> list[str]:
    """Greedy float32 tokens of a small model by every engine, against DynamicCache's, whichever
    were chosen."""
    model = RandomLlama(replace(TINY, dtype="float32"), 256, seed=1)
    prompts = drawn_tokens(TINY.vocabulary, 3, 21)
    engines, _ = made(replace(options, r=16), also=(TOKENS_OF,))
    with started(engines, model, Batch(3, 21, new)):
        tokens = {name: engine.generate(prompts, new) for name, engine in engines.items()}
    if tokens and TOKENS_OF not in tokens:
        return [f"greedy tokens were not checked: {TOKENS_OF} cannot run here"]
    return [
        f"greedy float32 tokens of {engines[name].title} are not those of "
        f"{engines[TOKENS_OF].title}"
        for name, found in tokens.items()
        if not torch.equal(found, tokens[TOKENS_OF])
    ]


class _Cost(NamedTuple):
    """Seconds of a case with one round, and the bytes that its step reads."""

    seconds: float
    work: int

    def of(self, work: int) -> float:
        """Seconds of a case whose step reads so many."""
        return self.seconds * work / self.work


class _Session:
    """The loop over cases."""

    def __init__(
        self,
        options: Options,
        engines: Mapping[str, Engine],
        ceilings: Ceilings,
        missing: list[str],
        failures: list[str],
    ) -> None:
        self.options, self.engines, self.ceilings = options, engines, ceilings
        self.missing, self.failures = missing, failures
        self.rows: list[Row] = []

    def fitting(self) -> list[GenerateCase]:
        """The cases that there is memory for, before any engine has started."""
        options = self.options
        if not self.engines:
            return []
        found = []
        for case in options.cases:
            batch = options.batch(case)
            weights = options.shape.weight_bytes
            if self._fits(case, lacking_memory(self.engines, options.shape, batch, batch, weights)):
                found.append(case)
        return found

    def _fits(self, case: GenerateCase, lacking: str | None) -> bool:
        if lacking is not None:
            advice = "choose fewer systems with --systems"
            self.missing.append(f"{case.name}: {lacking}; {advice}")
        return lacking is None

    def measure(self, cases: Sequence[GenerateCase], budget: Budget, tell: Progress) -> None:
        """Those that there is time for, by what the one before them took."""
        last: _Cost | None = None
        for number, case in enumerate(cases):
            tell(case.name, 0.05 + 0.95 * number / len(cases))
            batch = self.options.batch(case)
            seconds = 0.0 if last is None else last.of(self._work(batch))
            if budget.is_spent() or seconds > budget.left():
                self.missing.append(f"{case.name}: {OUT_OF_TIME}")
            elif self._fits(case, lacking_memory(self.engines, self.options.shape, batch)):
                last = self._case(case, batch, budget, len(cases) - number)

    def _work(self, batch: Batch) -> int:
        return self.options.shape.step_bytes(batch.sequences, batch.rows)

    def _case(self, case: GenerateCase, batch: Batch, budget: Budget, cases_left: int) -> _Cost:
        """Measures it; returns what it took with a single round."""
        start = time.monotonic()
        timed = {name: self.engines[name] for name in self.options.engines if name in self.engines}
        try:
            before = self._filled(batch, timed)
            started = time.monotonic()
            # Filling is over: shared out are the seconds for steps.
            turns = self._turns(case, timed, budget.part(cases_left))
            stepping = time.monotonic() - started
            rows = [self._row(case, batch, engine, turns, math.nan) for engine in timed.values()]
            errors = self._errors(timed, before)
        finally:
            for engine in self.engines.values():
                engine.empty()
        self.rows += [row._replace(logits_error=errors[row.system]) for row in rows]
        for row in rows:
            self._check(case, self.engines[row.system], errors[row.system])
        once = time.monotonic() - start - stepping * (1 - 1 / turns.rounds)
        return _Cost(once, self._work(batch))

    def _filled(self, batch: Batch, timed: Mapping[str, Engine]) -> dict[str, torch.Tensor]:
        """Logits of every engine's first step; those that are timed are ready for their turns."""
        logits = {}
        for name, engine in self.engines.items():
            engine.fill(batch)
            logits[name] = engine.logits()
            if name in timed:
                engine.step(WARM_STEPS - 1)
            else:
                engine.empty()
        return logits

    def _turns(self, case: GenerateCase, timed: Mapping[str, Engine], budget: Budget) -> Turns:
        rounds = self.options.rounds
        turns = take_turns(
            timed, rounds, lambda engine: PEER_STEPS if engine.peer else BMC_STEPS, budget
        )
        if turns.rounds < rounds:
            self.missing.append(
                f"{case.name}: rounds {turns.rounds + 1} to {rounds}: {OUT_OF_TIME}"
            )
        return turns

    def _errors(
        self, timed: Mapping[str, Engine], before: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """Of the logits before the turns and after them: what is timed follows a growth. The
        reference is given the engine's own tokens, so that both have seen the same."""
        after, tokens = {}, {}
        for name, engine in timed.items():
            after[name] = engine.logits()
            tokens[name] = torch.tensor(engine.tokens())[:, :-1]
        errors = dict.fromkeys(timed, math.nan)
        for name, engine in timed.items():
            if engine.reference == name or engine.reference not in self.engines:
                continue
            errors[name] = relative_error(before[name], before[engine.reference])
            expected = self.engines[engine.reference].replay(tokens[name])
            if expected is not None:
                errors[name] = worse(errors[name], relative_error(after[name], expected))
        return errors

    def _check(self, case: GenerateCase, engine: Engine, error: float) -> None:
        if engine.reference not in self.engines:
            self.missing.append(
                f"{case.name}: {engine.title}'s logits were not checked: {engine.reference} "
                "cannot run here"
            )
        elif engine.reference != engine.name and not error <= LOGIT_TOLERANCE:
            self.failures.append(
                f"{case.name}: the logits of {engine.title} differ from "
                f"{engine.reference}'s by {error:.1e}; allowed: {LOGIT_TOLERANCE}"
            )

    def _row(
        self, case: GenerateCase, batch: Batch, engine: Engine, turns: Turns, error: float
    ) -> Row:
        options, shape = self.options, self.options.shape
        steps: list[Step] = turns.steps[engine.name]
        timing = summary([step.seconds for step in steps if not step.grew])
        growths = [step.seconds * 1e3 for step in steps if step.grew]
        growth_ms = max(0.0, statistics.median(growths) - timing.ms) if growths else 0.0
        counted = engine.counted()
        work = (batch.sequences, batch.rows)
        return Row(
            case,
            batch.rows,
            engine.name,
            engine.title,
            engine.peer,
            turns.rounds,
            timing,
            growth_ms,
            timing.ms + growth_ms / options.r,
            self.ceilings.floor(
                shape.step_bytes(*work), shape.step_flops(*work), options.threads, shape.dtype
            ),
            error,
            math.nan if counted is None else counted.bytes_copied / 1e6,
            math.nan if counted is None else counted.bytes_reserved / 1e6,
        )


def worse(*errors: float) -> float:
    """The largest; infinite where one is not a number."""
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def judge(rows: Sequence[Row], goals: Sequence[Goal]) -> list[Verdict]:
    """Each goal; no engine of ours is faster than the floor."""
    at_floor = [row._replace(step_ms=row.floor.ms) if not row.peer else row for row in rows]
    told = all(row.floor.told for row in rows)
    return [
        Verdict(goal.case, goal, measured_ratio(rows, goal), measured_ratio(at_floor, goal), told)
        for goal in goals
    ]


def measured_ratio(rows: Sequence[Row], goal: Goal) -> float | None:
    """The peer's time over the system's in the goal's case, or the mean of that ratio over the
    grid, if all of it was measured."""
    ms = {(row.case, row.system): row.step_ms for row in rows}
    cases = [case for case in FULL if goal.case in (GRID, case.name)]
    sides = [(ms.get((case, goal.system)), ms.get((case, goal.against))) for case in cases]
    ratios = [peer / ours for ours, peer in sides if ours is not None and peer is not None]
    return statistics.fmean(ratios) if ratios and len(ratios) == len(cases) else None
