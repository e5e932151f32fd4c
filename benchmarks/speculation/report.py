"""What the speculation benchmark prints and writes. Knows nothing of measuring."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lib import goals, record
from benchmarks.lib.record import show_end
from benchmarks.lib.samples import percent, spread_of
from benchmarks.speculation.cases import Case
from benchmarks.speculation.run import Report, Row


def document(report: Report) -> dict[str, Any]:
    """The run as plain data: the head of `lib/record.py`, and

    "settings": {bind, openmp, rounds}, "controller_us", "marked": [text],
    "rows": [{case, model, dtype, layers, hidden, heads, kv_heads, head_size, method, draft_layers,
              epsilon, batch, rows, new, system, length, threads, openmp, ms, ms_low, ms_high,
              ms_min, spread, turns, tokens_per_second, acceptance, matched, mean_length,
              tokens_per_step, draft_cost, forward_ms, bound, over_none, agreement}]

    Times are milliseconds per token of all requests together; the other fields are those of
    `rows.Row`.
    """
    options, timing = report.options, report.controller
    return record.document(
        "speculation",
        report.record,
        {name: getattr(options, name) for name in ("bind", "openmp", "rounds")},
        failures=report.failures,
        missing=report.missing,
        marked=report.marked,
        goals=goals.document(report.verdicts),
        controller_us=None if timing is None else timing.ms * 1e3,
        rows=[_row(row, report) for row in report.rows],
    )


def _row(row: Row, report: Report) -> dict[str, Any]:
    case, pair, shape = row.case, row.case.pair, row.case.pair.shape
    widths = ("dtype", "layers", "hidden", "heads", "kv_heads", "head_size")
    told = (
        *("system", "length", "threads", "openmp", "tokens_per_second", "acceptance", "matched"),
        *("mean_length", "tokens_per_step", "draft_cost", "forward_ms", "bound", "over_none"),
        "agreement",
    )
    return {
        "case": case.name,
        "model": shape.name,
        **{name: getattr(shape, name) for name in widths},
        "method": pair.method,
        "draft_layers": pair.draft_layers,
        "epsilon": report.epsilons.get(case.name),
        **{name: getattr(case, name) for name in ("batch", "rows", "new")},
        **{name: getattr(row, name) for name in told},
        **row.timing.document("turns"),
        "spread": spread_of(row.timing),
    }


def show(report: Report, console: Console, with_goals: bool = False) -> None:
    """A table per case, and what went wrong."""
    console.print(report.record.head(), highlight=False)
    for case in report.options.cases:
        rows = [row for row in report.rows if row.case is case]
        if rows:
            console.print(_table(case, rows, report))
    if report.controller is not None:
        timing = report.controller
        console.print(
            f"controller, 64 requests: {timing.ms * 1e3:.0f} microseconds a step (quartiles "
            f"{timing.low * 1e3:.0f} and {timing.high * 1e3:.0f})",
            highlight=False,
        )
    if with_goals:
        goals.show(report.verdicts, report.record.isas, console)
    lines = [f"not measured: {text}" for text in report.missing]
    lines += [f"outputs differ, as bfloat16 may: {text}" for text in report.marked]
    show_end(console, report.record, lines, report.failures)


COLUMNS = (
    "tokens/s",
    "best turn",
    "spread",
    "faster",
    "at most",
    "accepted",
    "matched",
    "drafts/step",
    "tokens/step",
    "draft step",
    "forward ms",
    "agrees",
)


def _table(case: Case, rows: list[Row], report: Report) -> Table:
    shape = case.pair.shape
    epsilon = report.epsilons.get(case.name)
    runtimes = sorted({row.openmp for row in rows})
    source = (
        f"draft of {case.pair.draft_layers} layers" if case.pair.method == "draft" else "n-gram"
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{case.name}: {source}{'' if epsilon is None else f', epsilon {epsilon:.3g}'}, "
        f"{case.text} prompts, {case.new} tokens; {shape.layers} layers, width {shape.hidden}, "
        f"{shape.heads} heads on {shape.kv_heads}, {shape.dtype}; {rows[0].threads} threads, "
        f"{', '.join(runtimes)}",
        title_justify="left",
    )
    for name in ("system", "draft tokens"):
        table.add_column(name)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in rows:
        table.add_row(
            row.title if row.system != before else "",
            str(row.length),
            f"{row.tokens_per_second:.1f}",
            f"{1e3 / row.timing.best:.1f}",
            percent(spread_of(row.timing)),
            _times(row.over_none),
            _times(row.bound),
            percent(row.acceptance),
            percent(row.matched),
            _number(row.mean_length),
            _number(row.tokens_per_step),
            percent(row.draft_cost),
            _number(row.forward_ms),
            percent(row.agreement),
            style="bold" if row.length == "auto" else None,
        )
        before = row.system
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"
