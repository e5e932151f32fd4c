"""What the overhead benchmark prints and writes. Knows nothing of measuring."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lib import goals, record
from benchmarks.lib.record import show_end
from benchmarks.lib.samples import percent, spread_of
from benchmarks.overhead.layers import SHAPE
from benchmarks.overhead.run import Report, Row


def document(report: Report) -> dict[str, Any]:
    """The run as plain data: the head of `lib/record.py`, and

    "settings": {seconds, isa, calls},
    "rows": [{system, work, us, us_low, us_high, us_min, spread, samples}]

    us is the median over samples of `calls` calls in a row, us_low and us_high are the quartiles.
    """
    options = report.options
    return record.document(
        "overhead",
        report.record,
        {"seconds": options.seconds, "isa": options.isa, "calls": options.calls},
        failures=report.failures,
        goals=goals.document(report.verdicts),
        rows=[_row(row) for row in report.rows],
    )


def _row(row: Row) -> dict[str, Any]:
    timing = row.timing
    return {
        "system": row.name,
        "work": row.work,
        "us": row.microseconds(timing.ms),
        "us_low": row.microseconds(timing.low),
        "us_high": row.microseconds(timing.high),
        "us_min": row.microseconds(timing.best),
        "spread": spread_of(timing),
        "samples": timing.calls,
    }


def table(rows: list[Row]) -> Table:
    """One line per side and kind of call."""
    table = Table(box=box.SIMPLE_HEAD, title=f"One layer, {SHAPE}", title_justify="left")
    table.add_column("system")
    table.add_column("calls")
    for name in ("µs", "least", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        if before and row.name != before:
            table.add_section()
        table.add_row(
            row.title if row.name != before else "",
            row.work,
            f"{row.microseconds(row.timing.ms):.1f}",
            f"{row.microseconds(row.timing.best):.1f}",
            percent(spread_of(row.timing), 1),
        )
        before = row.name
    return table


def show(report: Report, console: Console, with_goals: bool = False) -> None:
    """The table, and what went wrong."""
    console.print(report.record.head(), highlight=False)
    console.print(table(report.rows))
    if with_goals:
        goals.show(report.verdicts, report.record.isas, console)
    show_end(console, report.record, [], report.failures)
