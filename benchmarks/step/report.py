"""What the step benchmark prints and writes. Knows nothing of measuring."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lib import goals, record
from benchmarks.lib.record import show_end
from benchmarks.lib.samples import error_text, percent, spread_of
from benchmarks.step.run import Report, Row


def document(report: Report) -> dict[str, Any]:
    """The run as plain data: the head of `lib/record.py`, and

    "settings": {bind, rounds, steps, compile, drawn, pools}, "read_gb_s",
    "rows": [{case, pool, model, layers, hidden, heads, kv_heads, head_size, batch, rows, system,
              threads, ms, ms_low, ms_high, ms_min, spread, steps, tokens_per_second, floor_ms,
              floor_binds, ratio, logits_error, logits_error_after,
              tokens_agree}]

    floor_ms is what reading weights and rows, or multiplying with them, takes at the measured
    ceilings; floor_binds says which ("reads", "products").
    """
    names = ("bind", "rounds", "steps", "compile", "drawn", "pools")
    return record.document(
        "step",
        report.record,
        {name: getattr(report.options, name) for name in names},
        failures=report.failures,
        missing=report.missing,
        goals=goals.document(report.verdicts),
        read_gb_s=report.read_gb_s,
        rows=[_row(row) for row in report.rows],
    )


def _row(row: Row) -> dict[str, Any]:
    case, shape = row.case, row.case.shape
    widths = ("layers", "hidden", "heads", "kv_heads", "head_size")
    return {
        "case": case.name,
        "pool": row.pool,
        "model": shape.name,
        **{name: getattr(shape, name) for name in widths},
        "batch": case.batch,
        "rows": case.rows,
        "system": row.system,
        "threads": row.threads,
        **row.timing.document("steps"),
        "spread": spread_of(row.timing),
        "tokens_per_second": case.batch / row.timing.ms * 1e3,
        "floor_ms": row.floor.ms,
        "floor_binds": row.floor.binds,
        "ratio": row.ratio,
        "logits_error": row.logits_error,
        "logits_error_after": row.logits_error_after,
        "tokens_agree": row.tokens_agree,
    }


def show(report: Report, console: Console, with_goals: bool = False) -> None:
    """The table, and what went wrong."""
    console.print(report.record.head(), highlight=False)
    console.print(_table(report))
    if with_goals:
        goals.show(report.verdicts, report.record.isas, console)
    lines = [f"not checked: {text}" for text in report.missing]
    show_end(console, report.record, lines, report.failures)


def _table(report: Report) -> Table:
    options = report.options
    how = "compiled" if options.compile else "eager"
    rows = "drawn rows" if options.drawn else "prefilled rows"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"One decode step of vLLM: {how}, {rows}, threads bound to {options.bind}; "
        f"floor: what binds at {report.read_gb_s:.1f} GB/s and this machine's products",
        title_justify="left",
    )
    for name in ("case", "pool", "system"):
        table.add_column(name)
    columns = (
        "ms",
        "spread",
        "floor",
        "tokens/s",
        "faster",
        "differs",
        "after turns",
        "tokens agree",
    )
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        ours = not row.peer
        table.add_row(
            row.case.name if ours else "",
            row.pool if ours else "",
            row.title,
            f"{row.timing.ms:.1f}",
            percent(spread_of(row.timing)),
            str(row.floor) if ours else "",
            f"{row.case.batch / row.timing.ms * 1e3:.0f}",
            f"{row.ratio:.2f}x",
            error_text(row.logits_error),
            error_text(row.logits_error_after),
            f"{row.tokens_agree:.0%}" if ours else "",
            style="bold" if ours else None,
        )
    return table
