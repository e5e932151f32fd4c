"""`python -m benchmarks generate`: a decode step of Hugging Face generation, BMC and its peers.

Promises that all systems step in turns over the same weights and the same rows, and that a system
whose logits or greedy tokens are not those of the cache that it replaces makes the run fail. What
BMC pays for growing is part of its figure: each case's rows end shortly before a growth, so that
one falls among the timed steps, and its extra time is spread over the r steps that it serves. Knows
nothing of how a system is built.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM

from benchmarks.engines.llama_cpp import LlamaCpp
from benchmarks.engines.transformers import NAMES, GenerateSystem, build_model, make
from benchmarks.lib.answers import LOGIT_TOLERANCE, relative_error
from benchmarks.lib.ceilings import MIN_READ_BYTES, available_bytes, read_bandwidth, threads_set
from benchmarks.lib.llama import MHA, Shape
from benchmarks.lib.timing import Timing, summary
from bmc_core.costs.measure import Progress
from bmc_core.machine.load import Neighbors

SPARE_ROWS = 6
"""Rows that fit before the growth that is timed."""
WARM_STEPS = 2
TINY = Shape("tiny", 2, 128, 4, 2, 32, intermediate=256, vocabulary=512)


class GenerateCase(NamedTuple):
    """A decode batch: `batch` sequences of about `rows` rows. `grid`: counts for the average."""

    batch: int
    rows: int
    grid: bool = True

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.rows}"


class Goal(NamedTuple):
    """`system` should be `least` times as fast as `peer` in `case`; "" is the average."""

    system: str
    peer: str
    case: str
    least: float


QUICK = (GenerateCase(8, 2000), GenerateCase(1, 2000), GenerateCase(8, 256))
FULL = tuple(GenerateCase(batch, rows) for batch in (1, 4, 8) for rows in (256, 1000, 2000, 4000))
GOALS = tuple(
    Goal(system, peer, case, least)
    for system, peer, goals in (
        ("bmc", "dynamic", (7.0, 1.5, 3.2)),
        ("bmc", "static", (3.3, 1.5, 2.0)),
        ("bmc_deepspeed", "deepspeed", (7.0, 1.5, 3.2)),
        ("bmc_packed", "dynamic", (9.0, 2.5, 4.0)),
        ("bmc_packed", "static", (4.5, 2.5, None)),
        ("bmc_packed", "deepspeed", (9.0, 2.5, None)),
        ("bmc_packed", "llama_cpp", (None, 1.0, None)),
    )
    for case, least in zip(("8 x 2000", "1 x 2000", ""), goals, strict=True)
    if least is not None
)


@dataclass(frozen=True)
class Options:
    """A run: `rounds` turns; a turn is two steps of a peer and six of a BMC system, which must
    also grow. `r`: rows per growth. `llama_cpp_python`: interpreter with llama-cpp-python, for
    llama.cpp as one more system."""

    cases: Sequence[GenerateCase]
    threads: int
    systems: Sequence[str] = NAMES
    r: int = 128
    rounds: int = 5
    shape: Shape = field(default=MHA)
    dtype: torch.dtype = torch.bfloat16
    llama_cpp_python: Path | None = None

    def rows(self, case: GenerateCase) -> int:
        """The case's rows, moved to where a chunk is almost full."""
        return max(1, round(case.rows / self.r)) * self.r - min(SPARE_ROWS, self.r - 1)


class GenerateRow(NamedTuple):
    """One system on one case.

    Attributes:
        rows: per sequence when timing starts.
        timing: of the steps without a growth.
        growth_ms: what a step with a growth took longer; 0 where none was seen.
        step_ms: median step plus its share of a growth.
        floor_ms: what reading the weights and the valid rows takes at the measured bandwidth.
        logits_error: of the first step, relative to those of the system's reference (DynamicCache,
            or the peer itself, where that computes otherwise); NaN without it.
        copied_mb, reserved_mb: counted by the cache; NaN where it does not count.
    """

    case: GenerateCase
    rows: int
    system: str
    title: str
    peer: bool
    timing: Timing
    growth_ms: float
    step_ms: float
    floor_ms: float
    logits_error: float
    copied_mb: float
    reserved_mb: float


class Verdict(NamedTuple):
    """A goal, what was measured, and what a system that reads weights and rows at the measured
    bandwidth and does nothing else would reach; None: a side or a case is missing."""

    goal: Goal
    measured: float | None
    at_most: float | None


class GenerateReport(NamedTuple):
    """All that a run found out. `missing`: why a system or a case was not measured; `read_gb_s`:
    read bandwidth."""

    rows: list[GenerateRow]
    failures: list[str]
    missing: list[str]
    verdicts: list[Verdict]
    options: Options
    read_gb_s: float
    others: float | None


def run(options: Options, tell: Progress = lambda text, fraction: None) -> GenerateReport:
    """Measures every case.

    Raises:
        WorkerError: `Options.llama_cpp_python` does not do.
    """
    neighbors = Neighbors()
    rows: list[GenerateRow] = []
    with threads_set(options.threads):
        tell("greedy tokens of a small model", 0.0)
        failures = check_tokens(options)
        tell("read bandwidth", 0.01)
        read_gb_s = read_bandwidth(MIN_READ_BYTES).rate
        tell("building the model", 0.02)
        most = max(case.rows for case in options.cases) + options.r + 8 * options.rounds + 64
        model = build_model(options.shape, most, options.dtype, seed=0)
        with _open_systems(options, model) as (systems, missing):
            for number, case in enumerate(options.cases):
                tell(case.name, 0.05 + 0.95 * number / len(options.cases))
                needed, free = _case_bytes(case, options, len(systems)), available_bytes()
                if needed > free:
                    missing.append(
                        f"{case.name}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are "
                        "free; choose fewer systems with --systems"
                    )
                    continue
                measured, wrong = _case(case, options, systems, read_gb_s)
                rows += measured
                failures += wrong
    tell("done", 1.0)
    floors = [row._replace(step_ms=row.floor_ms) if not row.peer else row for row in rows]
    verdicts = [
        Verdict(goal, measured_ratio(rows, goal), measured_ratio(floors, goal)) for goal in GOALS
    ]
    return GenerateReport(rows, failures, missing, verdicts, options, read_gb_s, neighbors.share())


def _case_bytes(case: GenerateCase, options: Options, systems: int) -> int:
    """K and V of every system, each with room to grow, and a layer's copy."""
    rows = options.rows(case) + 2 * options.r
    return (systems + 1) * case.batch * rows * options.shape.row_bytes


@contextmanager
def _open_systems(
    options: Options, model: LlamaForCausalLM
) -> Iterator[tuple[list[GenerateSystem], list[str]]]:
    """All systems that can run here, and why others cannot."""
    systems: list[GenerateSystem] = []
    missing = []
    try:
        for name in options.systems:
            try:
                systems.append(make(name, model, options.r))
            except ImportError as error:
                missing.append(f'{name}: {error}; pip install "bmc-llm[deepspeed]"')
        if options.llama_cpp_python is not None:
            systems.append(LlamaCpp(model, options.llama_cpp_python, options.threads))
        yield systems, missing
    finally:
        for system in systems:
            system.close()


def check_tokens(options: Options, new: int = 40) -> list[str]:
    """Greedy float32 tokens of a small model by every system, against the first one's."""
    model = build_model(TINY, 256, torch.float32, seed=1)
    prompts = torch.randint(0, TINY.vocabulary, (3, 21))
    with _open_systems(replace(options, cases=[], r=16), model) as (systems, _):
        tokens = {system.title: system.generate(prompts, new) for system in systems}
    expected = next(iter(tokens.values()), None)
    return [
        f"greedy float32 tokens of {title} are not those of {next(iter(tokens))}"
        for title, found in tokens.items()
        if expected is None or not torch.equal(found, expected)
    ]


def _case(
    case: GenerateCase, options: Options, systems: Sequence[GenerateSystem], read_gb_s: float
) -> tuple[list[GenerateRow], list[str]]:
    shape, rows = options.shape, options.rows(case)
    size = (case.batch, shape.kv_heads, rows, shape.head_size)
    tokens = torch.randint(0, shape.vocabulary, (case.batch, 1))
    steps = 6 * options.rounds + WARM_STEPS
    logits: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        key, value = (torch.randn(size, dtype=options.dtype) for _ in "kv")
        for system in systems:
            system.fill(layer, key, value, steps)
    for system in systems:
        logits[system.name] = system.step(tokens).float()
        for _ in range(WARM_STEPS - 1):
            system.step(tokens)
    seconds, growths = _alternate(systems, tokens, options.rounds)
    result, failures = [], []
    for system in systems:
        timing = summary(seconds[system.name])
        error = float("nan")
        if system.reference in logits:
            error = relative_error(logits[system.name], logits[system.reference])
            if not error <= LOGIT_TOLERANCE:
                failures.append(
                    f"{case.name}: the logits of {system.title} differ from {system.reference}'s "
                    f"by {error:.1e}; allowed: {LOGIT_TOLERANCE}"
                )
        extra = 0.0
        if growths[system.name]:
            extra = max(0.0, statistics.median(growths[system.name]) * 1e3 - timing.ms)
        stats = system.stats()
        nan = float("nan")
        result.append(
            GenerateRow(
                case,
                rows,
                system.name,
                system.title,
                system.peer,
                timing,
                extra,
                timing.ms + extra / options.r,
                shape.step_bytes(case.batch, rows) / read_gb_s / 1e6,
                error,
                nan if stats is None else stats.bytes_copied / 1e6,
                nan if stats is None else stats.bytes_reserved / 1e6,
            )
        )
        system.cache = None
    return result, failures


def _alternate(
    systems: Sequence[GenerateSystem], tokens: torch.Tensor, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the steps without a growth, and of those with one, by system."""
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    growths: dict[str, list[float]] = {system.name: [] for system in systems}
    order, draw = list(systems), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)  # what one leaves behind (freed memory, caches) meets all others
        for system in order:
            for _ in range(2 if system.peer else 6):
                before = _growths(system)
                start = time.perf_counter()
                system.step(tokens)
                taken = time.perf_counter() - start
                (seconds if _growths(system) == before else growths)[system.name].append(taken)
    return seconds, growths


def _growths(system: GenerateSystem) -> int:
    stats = system.stats()
    return 0 if stats is None else stats.growths


def measured_ratio(rows: Sequence[GenerateRow], goal: Goal) -> float | None:
    """The peer's time over the system's in the goal's case, or the mean of that ratio over the
    grid, if all of it was measured."""
    ms = {(row.case, row.system): row.step_ms for row in rows}
    cases = [case for case in FULL if not goal.case or case.name == goal.case]
    sides = [(ms.get((case, goal.system)), ms.get((case, goal.peer))) for case in cases]
    ratios = [peer / ours for ours, peer in sides if ours is not None and peer is not None]
    return statistics.fmean(ratios) if len(ratios) == len(cases) else None
