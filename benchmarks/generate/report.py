"""What the generate benchmark prints and writes. Knows nothing of measuring."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.generate.run import GenerateReport, GenerateRow
from benchmarks.lib.ceilings import describe, versions
from bmc_core.machine.load import BUSY

SCHEMA = 1


def _ratio(report: GenerateReport, row: GenerateRow, peer: str) -> float | None:
    for other in report.rows:
        if other.case == row.case and other.system == peer:
            return other.step_ms / row.step_ms
    return None


def generate_document(report: GenerateReport, created: str) -> dict[str, Any]:
    """The run as plain data.

    {"schema": 1, "benchmark": "generate", "created", "machine", "versions",
     "settings": {threads, r, rounds, dtype, model}, "read_gb_s", "failures": [text],
     "missing": [text],
     "rows": [{case, batch, rows, system, ms, ms_low, ms_high, ms_min, steps, growth_ms, step_ms,
               floor_ms, logits_error, copied_mb, reserved_mb, ratios: {peer: x}}],
     "goals": [{system, peer, case, least, measured, at_most, met}]}

    Times are milliseconds of one step; `step_ms` is `ms` and its share of a growth, `floor_ms` what
    reading weights and valid rows takes at the measured bandwidth; `at_most` is a goal's ratio for
    a system that takes no longer than that.
    """
    options = report.options
    peers = [row.system for row in report.rows if row.peer]
    return {
        "schema": SCHEMA,
        "benchmark": "generate",
        "created": created,
        "machine": describe()._replace(others=report.others)._asdict(),
        "versions": versions(),
        "settings": {
            "threads": options.threads,
            "r": options.r,
            "rounds": options.rounds,
            "dtype": str(options.dtype).removeprefix("torch."),
            "model": options.shape.name,
        },
        "read_gb_s": report.read_gb_s,
        "failures": report.failures,
        "missing": report.missing,
        "rows": [
            {
                "case": row.case.name,
                "batch": row.case.batch,
                "rows": row.rows,
                "system": row.system,
                "ms": row.timing.ms,
                "ms_low": row.timing.low,
                "ms_high": row.timing.high,
                "ms_min": row.timing.best,
                "steps": row.timing.calls,
                "growth_ms": row.growth_ms,
                "step_ms": row.step_ms,
                "floor_ms": row.floor_ms,
                "logits_error": row.logits_error,
                "copied_mb": row.copied_mb,
                "reserved_mb": row.reserved_mb,
                "ratios": {peer: _ratio(report, row, peer) for peer in sorted(set(peers))},
            }
            for row in report.rows
        ],
        "goals": [
            {
                **verdict.goal._asdict(),
                "case": verdict.goal.case or "average",
                "measured": verdict.measured,
                "at_most": verdict.at_most,
                "met": None if verdict.measured is None else verdict.measured >= verdict.goal.least,
            }
            for verdict in report.verdicts
        ],
    }


def show_generate(report: GenerateReport, console: Console) -> None:
    """The tables, and what went wrong."""
    console.print(_steps(report))
    if any(verdict.measured is not None for verdict in report.verdicts):
        console.print(_goals(report))
    for text in report.missing:
        console.print(f"not measured: {text}", highlight=False, markup=False)
    if report.others is not None and report.others > BUSY:
        console.print(
            f"Other processes took {report.others:.0%} of the cores during the run: the figures "
            "are too high, and their ratio is worth little.",
            highlight=False,
        )
    for text in report.failures:
        console.print(text, style="bold red", markup=False, highlight=False)


def _steps(report: GenerateReport) -> Table:
    options = report.options
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"One decode step of Hugging Face generation: {options.shape.name}, "
        f"{str(options.dtype).removeprefix('torch.')}, r = {options.r}, {options.threads} threads; "
        f"floor: weights and valid rows read at {report.read_gb_s:.1f} GB/s",
        title_justify="left",
    )
    peers = list(dict.fromkeys(row.system for row in report.rows if row.peer))
    titles = {row.system: row.title for row in report.rows}
    for name in ("batch x rows", "system"):
        table.add_column(name)
    ratio_columns = [f"{titles[peer]} is" for peer in peers]
    for name in ("ms", "spread", "+ growth", "floor", *ratio_columns, "differs"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in report.rows:
        ratios = [_ratio(report, row, peer) for peer in peers]
        table.add_row(
            row.case.name if row.case != last else "",
            row.title,
            f"{row.timing.ms:.1f}",
            f"{row.timing.spread:.0%}",
            "" if row.peer else f"{row.step_ms - row.timing.ms:.2f}",
            f"{row.floor_ms:.1f}" if row.case != last else "",
            *("" if row.peer or ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            "" if math.isnan(row.logits_error) else f"{row.logits_error:.0e}",
            style=None if row.peer else "bold",
        )
        last = row.case
    return table


def _goals(report: GenerateReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Goals on this machine", title_justify="left")
    for name in ("system", "goal", "in"):
        table.add_column(name)
    table.add_column("measured", justify="right")
    table.add_column("at the floor", justify="right")
    table.add_column("")
    for goal, measured, at_most in report.verdicts:
        shown, most, mark = "", "", "not measured"
        if measured is not None and at_most is not None:
            shown, most = f"{measured:.2f}x", f"{at_most:.2f}x"
            mark = "[green]met[/]" if measured >= goal.least else "[yellow]not met[/]"
        where = goal.case or "mean of the 12 cases"
        table.add_row(goal.system, f">= {goal.least}x {goal.peer}", where, shown, most, mark)
    return table
