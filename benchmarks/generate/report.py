"""What the generate benchmark prints and writes. Knows nothing of measuring."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.generate.run import Report, Row
from benchmarks.lib import goals, record
from benchmarks.lib.record import show_end
from benchmarks.lib.samples import error_text, percent, spread_of


def _ratio(report: Report, row: Row, peer: str) -> float | None:
    for other in report.rows:
        if other.case == row.case and other.system == peer:
            return other.step_ms / row.step_ms
    return None


def document(report: Report) -> dict[str, Any]:
    """The run as plain data: the head of `lib/record.py`, and

    "settings": {threads, r, rounds, dtype, model}, "read_gb_s",
    "rows": [{case, batch, rows, system, rounds, ms, ms_low, ms_high, ms_min, spread, steps,
              growth_ms, step_ms, floor_ms, floor_binds, logits_error, copied_mb, reserved_mb,
              ratios: {peer: x}}]

    Times are milliseconds of one step; `step_ms` is `ms` and its share of a growth, `floor_ms` what
    reading weights and valid rows, or multiplying with them, takes at the measured ceilings, and
    `floor_binds` which of the two ("reads", "products").
    """
    options = report.options
    return record.document(
        "generate",
        report.record,
        {
            "threads": options.threads,
            "r": options.r,
            "rounds": options.rounds,
            "dtype": options.shape.dtype,
            "model": options.shape.name,
        },
        failures=report.failures,
        missing=report.missing,
        goals=goals.document(report.verdicts),
        read_gb_s=report.read_gb_s,
        rows=[_row(row, report) for row in report.rows],
    )


def _row(row: Row, report: Report) -> dict[str, Any]:
    peers = sorted({other.system for other in report.rows if other.peer})
    return {
        "case": row.case.name,
        "batch": row.case.batch,
        "rows": row.rows,
        "system": row.system,
        "rounds": row.rounds,
        **row.timing.document("steps"),
        "spread": spread_of(row.timing),
        "growth_ms": row.growth_ms,
        "step_ms": row.step_ms,
        "floor_ms": row.floor.ms,
        "floor_binds": row.floor.binds,
        "logits_error": row.logits_error,
        "copied_mb": row.copied_mb,
        "reserved_mb": row.reserved_mb,
        "ratios": {peer: _ratio(report, row, peer) for peer in peers},
    }


def show(report: Report, console: Console, with_goals: bool = False) -> None:
    """The tables, and what went wrong."""
    console.print(report.record.head(), highlight=False)
    console.print(_table(report))
    if with_goals:
        goals.show(report.verdicts, report.record.isas, console)
    lines = [f"not measured: {text}" for text in report.missing]
    show_end(console, report.record, lines, report.failures)


def _table(report: Report) -> Table:
    options = report.options
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"One decode step of Hugging Face generation: {options.shape.name}, "
        f"{options.shape.dtype}, r = {options.r}, {options.threads} threads; "
        f"floor: what binds at {report.read_gb_s:.1f} GB/s and this machine's products",
        title_justify="left",
    )
    peers = list(dict.fromkeys(row.system for row in report.rows if row.peer))
    titles = {row.system: row.title for row in report.rows}
    for name in ("batch x rows", "system"):
        table.add_column(name)
    ratio_columns = [f"{titles[peer]} is" for peer in peers]
    for name in ("ms", "spread", "rounds", "+ growth", "floor", *ratio_columns, "differs"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in report.rows:
        ratios = [_ratio(report, row, peer) for peer in peers]
        table.add_row(
            row.case.name if row.case != last else "",
            row.title,
            f"{row.timing.ms:.1f}",
            percent(spread_of(row.timing)),
            str(row.rounds),
            "" if row.peer else f"{row.step_ms - row.timing.ms:.2f}",
            str(row.floor) if row.case != last else "",
            *("" if row.peer or ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            error_text(row.logits_error),
            style=None if row.peer else "bold",
        )
        last = row.case
    return table
