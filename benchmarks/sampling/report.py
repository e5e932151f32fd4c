"""What the sampling benchmark prints and writes. Knows nothing of measuring."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.lib import goals, record
from benchmarks.lib.record import show_end
from benchmarks.lib.samples import percent, spread_of
from benchmarks.sampling.run import Report, Row
from benchmarks.sampling.samplers import DRAFT_PROBABILITY, TOP_P


def document(report: Report) -> dict[str, Any]:
    """The run as plain data: the head of `lib/record.py`, and

    "settings": {seconds, threads, draft_probability, top_p},
    "rows": [{case, vocab, batch, drafts, mode, system, ms, ms_low, ms_high, ms_min, spread,
              samples}]

    drafts is null where speculation is not configured.
    """
    options = report.options
    return record.document(
        "sampling",
        report.record,
        {
            "seconds": options.seconds,
            "threads": options.threads,
            "draft_probability": DRAFT_PROBABILITY,
            "top_p": TOP_P,
        },
        failures=report.failures,
        goals=goals.document(report.verdicts),
        rows=[
            {
                "case": row.case.name,
                **asdict(row.case),
                "system": row.name,
                **row.timing.document("samples"),
            }
            for row in report.rows
        ],
    )


def table(report: Report) -> Table:
    """One line per case."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"A step's sampling, bfloat16 logits, {report.options.threads} threads",
        title_justify="left",
    )
    table.add_column("vocabulary, requests, draft tokens")
    for name in ("BMC ms", "spread", "vLLM ms", "spread", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    by_case: dict[str, dict[str, Row]] = {}
    for row in report.rows:
        by_case.setdefault(row.case.name, {})[row.name] = row
    for name, sides in by_case.items():
        cells = [name]
        for side in ("bmc", "vllm"):
            timing = sides[side].timing
            cells += [f"{timing.ms:.2f}", percent(spread_of(timing))]
        table.add_row(*cells, f"{report.ratio(sides['bmc'].case):.1f}x")
    return table


def show(report: Report, console: Console, with_goals: bool = False) -> None:
    """The table, and what went wrong."""
    console.print(report.record.head(), highlight=False)
    console.print(table(report))
    if with_goals:
        goals.show(report.verdicts, report.record.isas, console)
    show_end(console, report.record, [], report.failures)
