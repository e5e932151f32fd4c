"""`python -m benchmarks step`: a whole decode step of vLLM, BMC against CPU_ATTN.

Promises that both engines live at the same time in processes of their own with the same thread
binding, and are stepped in turns; that both read rows written by their own backend; and that a
side whose logits are not finite, or are not the other's, makes the run fail. Knows nothing of
how an engine is built.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lib.answers import LOGIT_TOLERANCE, relative_error
from benchmarks.lib.ceilings import (
    MIN_READ_BYTES,
    available_bytes,
    describe,
    read_bandwidth,
    threads_set,
    versions,
)
from benchmarks.lib.llama import write_model
from benchmarks.lib.timing import SETTLE_SECONDS, Timing, summary
from benchmarks.lib.worker_client import WorkerProcess, worker_command
from benchmarks.step.cases import StepCase
from bmc_core.costs.measure import Progress
from bmc_core.machine.cpu import allowed_cpus, to_list_text
from bmc_core.machine.load import BUSY, Neighbors

SCHEMA = 1
BACKENDS = {"bmc": "BMC", "cpu_attn": "CPU_ATTN"}
WORKER = Path(__file__).parents[1] / "engines" / "vllm_worker.py"
START_SECONDS = 600.0
STEP_SECONDS = 600.0
WARM_STEPS = 3


@dataclass(frozen=True)
class Options:
    """A run: `rounds` turns of `steps` timed steps for each engine. `bind` is the value of
    VLLM_CPU_OMP_THREADS_BIND; `drawn`: see `vllm_worker.Worker.fill`."""

    cases: Sequence[StepCase]
    bind: str
    rounds: int = 8
    steps: int = 6
    compile: bool = False
    drawn: bool = True

    @property
    def new_rows(self) -> int:
        """Tokens that each sequence gets: timed, waking, warming and checking steps, and a few
        for those that are prefilled before the others."""
        return self.rounds * (self.steps + 1) + WARM_STEPS + 64


class StepRow(NamedTuple):
    """One engine on one case.

    Attributes:
        timing: of the decode steps.
        fill_seconds: until every sequence had its rows.
        ratio: the other engine's median over this one's.
        logits_error: of this engine's first decode step, relative to CPU_ATTN's.
        tokens_agree: share of the greedy tokens, up to each sequence's first difference, that
            are CPU_ATTN's.
    """

    case: StepCase
    system: str
    threads: int
    timing: Timing
    fill_seconds: float
    ratio: float
    logits_error: float
    tokens_agree: float


class StepReport(NamedTuple):
    """All that a run found out; `read_gb_s`: read bandwidth of as many threads; `others`: share of
    the cores that other processes took."""

    rows: list[StepRow]
    failures: list[str]
    options: Options
    read_gb_s: float
    others: float | None

    def floor_ms(self, case: StepCase) -> float:
        """What reading weights and rows takes at that bandwidth."""
        return case.shape.step_bytes(case.batch, case.rows) / self.read_gb_s / 1e6


def environment(bind: str, cache: Path) -> dict[str, str]:
    """Variables of both engines. What vLLM preloads for its own worker processes is preloaded
    here as well, since the engine runs in the child itself."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(map(str, preloads())),
    }


def preloads() -> list[Path]:
    """vLLM's allocator and torch's OpenMP runtime, where they are."""
    found: list[Path] = []
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "libs"
        found += sorted(folder.glob("libtcmalloc*.so*"))[:1]
    return found + sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]


def run(options: Options, tell: Progress = lambda text, fraction: None) -> StepReport:
    """Measures every case.

    Raises:
        WorkerError: an engine could not do what was asked.
        MemoryError: both engines do not fit.
    """
    rows: list[StepRow] = []
    failures: list[str] = []
    neighbors = Neighbors()
    for number, case in enumerate(options.cases):
        part = 1 / len(options.cases)

        def tell_part(text: str, done: float, case=case, number=number, part=part) -> None:
            tell(f"{case.name}: {text}", part * (number + done))

        _require_memory(case, options)
        with tempfile.TemporaryDirectory() as folder:
            measured, wrong = _case(case, options, Path(folder), tell_part)
        rows += measured
        failures += wrong
    tell("read bandwidth", 1.0)
    with threads_set(rows[0].threads):
        read_gb_s = read_bandwidth(MIN_READ_BYTES).rate
    tell("done", 1.0)
    return StepReport(rows, failures, options, read_gb_s, neighbors.share())


def _require_memory(case: StepCase, options: Options) -> None:
    needed = len(BACKENDS) * case.memory_bytes(options.new_rows)
    free = available_bytes()
    if needed > free:
        raise MemoryError(
            f"{case.name}: two engines need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
            "available; leave the case out with --only"
        )


def _case(
    case: StepCase, options: Options, folder: Path, tell: Progress
) -> tuple[list[StepRow], list[str]]:
    tell("writing the model", 0.0)
    max_rows = case.rows + options.new_rows + 16
    write_model(case.shape, folder / "model", max_rows, seed=0)
    children: dict[str, WorkerProcess] = {}
    started: dict[str, dict[str, Any]] = {}
    filled: dict[str, float] = {}
    logits: dict[str, torch.Tensor] = {}
    failures: list[str] = []
    try:
        for place, (name, backend) in enumerate(BACKENDS.items()):
            tell(f"{backend}: starting", 0.05 + 0.3 * place)
            child = children[name] = WorkerProcess(
                f"{case.name}, {backend}",
                worker_command(sys.executable, WORKER),
                environment(options.bind, folder / "cache"),
            )
            started[name] = child.ask(
                START_SECONDS,
                do="start",
                model=str(folder / "model"),
                backend=backend,
                batch=case.batch,
                rows=case.rows,
                steps=options.new_rows,
                pool_bytes=case.pool_bytes(options.new_rows),
                compile=options.compile,
                vocabulary=case.shape.vocabulary,
            )
            tell(f"{backend}: {case.batch} x {case.rows} rows", 0.15 + 0.3 * place)
            filled[name] = child.ask(START_SECONDS, do="fill", drawn=options.drawn)["seconds"]
            path = folder / f"{name}.pt"
            if not child.ask(STEP_SECONDS, do="check", path=str(path))["finite"]:
                failures.append(f"{case.name}: {backend} gives logits that are not finite")
            logits[name] = torch.load(path, weights_only=True)
        seconds = _alternate(children, options, tell)
        tokens = {name: child.ask(60, do="result")["tokens"] for name, child in children.items()}
    finally:
        for child in children.values():
            child.close()
    timings = {name: summary(values) for name, values in seconds.items()}
    rows = []
    for name, backend in BACKENDS.items():
        other = next(peer for peer in BACKENDS if peer != name)
        error = relative_error(logits[name], logits["cpu_attn"])
        if not error <= LOGIT_TOLERANCE:
            failures.append(
                f"{case.name}: {backend}'s logits differ from CPU_ATTN's by {error:.1e}; "
                f"allowed: {LOGIT_TOLERANCE}"
            )
        rows.append(
            StepRow(
                case,
                name,
                started[name]["threads"],
                timings[name],
                filled[name],
                timings[other].ms / timings[name].ms,
                error,
                agreement(tokens[name], tokens["cpu_attn"]),
            )
        )
    if len({row.threads for row in rows}) > 1:
        failures.append(f"{case.name}: the engines have {[r.threads for r in rows]} threads")
    return rows, failures


def _alternate(
    children: dict[str, WorkerProcess], options: Options, tell: Progress
) -> dict[str, list[float]]:
    """Seconds of the timed steps, in turns; every round starts with the other engine."""
    seconds: dict[str, list[float]] = {name: [] for name in children}
    order = list(children)
    for name in order:
        children[name].ask(STEP_SECONDS, do="steps", count=WARM_STEPS - 1)
    for turn in range(options.rounds):
        tell("stepping in turns", 0.65 + 0.35 * turn / options.rounds)
        for name in order:
            time.sleep(SETTLE_SECONDS)
            answer = children[name].ask(STEP_SECONDS, do="steps", count=options.steps)
            seconds[name] += answer["seconds"]
        order.reverse()
    return seconds


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


def step_document(report: StepReport, created: str) -> dict[str, Any]:
    """The run as plain data.

    {"schema": 1, "benchmark": "step", "created", "machine", "versions",
     "settings": {bind, rounds, steps, compile, drawn}, "read_gb_s", "failures": [text],
     "rows": [{case, model, layers, hidden, heads, kv_heads, head_size, batch, rows, system,
               threads, ms, ms_low, ms_high, ms_min, spread, steps, tokens_per_second, fill_seconds,
               floor_ms, ratio, goal, met, logits_error, tokens_agree}]}

    floor_ms: what reading weights and rows takes at the measured bandwidth.
    """
    options = report.options
    rows = []
    for row in report.rows:
        case, shape = row.case, row.case.shape
        goal = case.goal if row.system == "bmc" else None
        rows.append(
            {
                "case": case.name,
                "model": shape.name,
                "layers": shape.layers,
                "hidden": shape.hidden,
                "heads": shape.heads,
                "kv_heads": shape.kv_heads,
                "head_size": shape.head_size,
                "batch": case.batch,
                "rows": case.rows,
                "system": row.system,
                "threads": row.threads,
                "ms": row.timing.ms,
                "ms_low": row.timing.low,
                "ms_high": row.timing.high,
                "ms_min": row.timing.best,
                "spread": row.timing.spread,
                "steps": row.timing.calls,
                "tokens_per_second": case.batch / row.timing.ms * 1e3,
                "fill_seconds": row.fill_seconds,
                "floor_ms": report.floor_ms(case),
                "ratio": row.ratio,
                "goal": goal,
                "met": None if goal is None else row.ratio >= goal,
                "logits_error": row.logits_error,
                "tokens_agree": row.tokens_agree,
            }
        )
    return {
        "schema": SCHEMA,
        "benchmark": "step",
        "created": created,
        "machine": describe()._replace(others=report.others)._asdict(),
        "versions": versions(),
        "settings": {
            "bind": options.bind,
            "rounds": options.rounds,
            "steps": options.steps,
            "compile": options.compile,
            "drawn": options.drawn,
        },
        "read_gb_s": report.read_gb_s,
        "failures": report.failures,
        "rows": rows,
    }


def show_step(report: StepReport, console: Console) -> None:
    """The table, and what went wrong."""
    options = report.options
    how = "compiled" if options.compile else "eager"
    rows = "drawn rows" if options.drawn else "prefilled rows"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"One decode step of vLLM: {how}, {rows}, threads bound to {options.bind}; "
        f"floor: weights and rows read at {report.read_gb_s:.1f} GB/s",
        title_justify="left",
    )
    for name in ("case", "system"):
        table.add_column(name)
    columns = ("ms", "spread", "floor", "tokens/s", "faster", "goal", "")
    for name in (*columns, "logits differ", "tokens agree"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        ours = row.system == "bmc"
        goal = row.case.goal if ours else None
        mark = ""
        if goal is not None:
            mark = "[green]met[/]" if row.ratio >= goal else "[yellow]not met[/]"
        table.add_row(
            row.case.name if ours else "",
            BACKENDS[row.system],
            f"{row.timing.ms:.1f}",
            f"{row.timing.spread:.0%}",
            f"{report.floor_ms(row.case):.1f}" if ours else "",
            f"{row.case.batch / row.timing.ms * 1e3:.0f}",
            f"{row.ratio:.2f}x",
            f">= {goal}x" if goal is not None else "",
            mark,
            f"{row.logits_error:.0e}" if ours else "",
            f"{row.tokens_agree:.0%}" if ours else "",
            style="bold" if ours else None,
        )
    console.print(table)
    if report.others is not None and report.others > BUSY:
        console.print(
            f"Other processes took {report.others:.0%} of the cores during the run: the figures "
            "are too high, and their ratio is worth little.",
            highlight=False,
        )
    for text in report.failures:
        console.print(text, style="bold red", markup=False, highlight=False)


def default_bind() -> str:
    """All CPUs of the affinity mask."""
    return to_list_text(allowed_cpus())
