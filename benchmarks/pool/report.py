"""What the pool benchmark prints and writes. Knows nothing of measuring."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lib import goals, record
from benchmarks.lib.record import show_end
from benchmarks.pool.run import Report, Row


def document(report: Report) -> dict[str, Any]:
    """The run as plain data: the head of `lib/record.py`, and

    "settings": {turnovers, seed, loads: [...], systems: [...]},
    "rows": [{load, system, hits, attention, "worn": figures, "turnovers": [figures]}],
    "admissions": [{blocks, block_size, requests, prompt, outputs, system, steps, most_running,
                    preempted}]

    figures: {growths, adjacent, stretch, spare, hits, microseconds, preempted}, see `run.Turnover`;
    worn is their median over the second half of the turnovers. hits and attention: see `run.Row`.
    """
    options = report.options
    settings = {
        "turnovers": options.turnovers,
        "seed": options.seed,
        "loads": [asdict(load) for load in options.loads],
        "systems": [asdict(system) for system in options.systems],
    }
    return record.document(
        "pool",
        report.record,
        settings,
        failures=report.failures,
        goals=goals.document(report.verdicts),
        rows=[
            {
                "load": row.load.name,
                "system": row.system.name,
                "hits": row.hits,
                "attention": row.attention,
                "worn": row.worn._asdict(),
                "turnovers": [turnover._asdict() for turnover in row.turnovers],
            }
            for row in report.rows
        ],
        admissions=[
            {
                **asdict(one.admission),
                "system": one.system,
                "steps": one.steps,
                "most_running": one.most_running,
                "preempted": one.preempted,
            }
            for one in report.admitted
        ],
    )


def show(report: Report, console: Console, with_goals: bool = False) -> None:
    """The tables, and what went wrong."""
    console.print(report.record.head(), highlight=False)
    console.print(_table(report))
    same = "not the same" if report.failures else "the same"
    number = len(report.admitted) // 2
    console.print(
        "attention: time of BMC's kernel over these block tables, over that of the same rows in "
        "one stretch a request",
        highlight=False,
    )
    console.print(
        f"Admission: {number} pools, all requests waiting at once: {same} steps, requests running "
        "and preemptions as vLLM with the same blocks.",
        highlight=False,
    )
    if with_goals:
        goals.show(report.verdicts, report.record.isas, console)
    show_end(console, report.record, (), report.failures)


def _table(report: Report) -> Table:
    turnovers = report.options.turnovers
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"A KV pool after {turnovers} turnovers (median of the last {turnovers // 2}; hits: "
        "of all)",
        title_justify="left",
    )
    for name in ("load", "system"):
        table.add_column(name)
    for name in (
        "growths/1000",
        "adjacent",
        "rows side by side",
        "spare rows",
        "prefix hits",
        "attention",
        "scheduling us",
        "preempted",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    before = ""
    for row in report.rows:
        if before and row.load.name != before:
            table.add_section()
        table.add_row(*_cells(row, before), style="bold" if row.system.r else None)
        before = row.load.name
    return table


def _cells(row: Row, before: str) -> list[str]:
    worn = row.worn
    return [
        row.load.name if row.load.name != before else "",
        row.system.title,
        f"{worn.growths:.1f}",
        f"{worn.adjacent:.0%}",
        f"{worn.stretch:.0f}",
        f"{worn.spare:.0f}",
        f"{row.hits:.2%}" if row.load.caching else "-",
        f"{row.attention:.3f}x",
        f"{worn.microseconds:.0f}",
        f"{sum(turnover.preempted for turnover in row.turnovers)}",
    ]
