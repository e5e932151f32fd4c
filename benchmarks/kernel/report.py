"""Tables for the terminal, and the JSON documents.

The kernel document (`schema` 1):

    {"schema": 1, "benchmark": "kernel", "created": UTC time,
     "machine": {cpu, cores, l3_bytes, l3_known, available_bytes, load, others, openmp},
     "versions": {torch, vllm, bmc}, "notes": [text], "remarks": [text], "failures": [text],
     "rows": [{case, kind, batch, seq_lens, query_lens, query_heads, kv_heads, head_size, rows,
               query_rows, dtype, cache, block_size, table_factor, run_rows, planning, group,
               system, isa, threads, ms, ms_low, ms_high, ms_min, spread, calls, sets, set_bytes,
               kv_bytes, flops, gb_s, gflops, read_gb_s, gemm_gflops, share, error, ok, ratios,
               versions, cpu}],
     "goals": [{case, goal, metric, bound, against, value, met}],
     "comparisons": [{group, system, cases, ms, ms_min, spread, spread_min}]}

ms is the median, ms_low and ms_high are the quartiles, spread is their distance over the median,
others the share of all cores that other processes took during the run (null: not told);
share is of the ceiling that binds (null for a write); ratios are a peer's median over this row's.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.kernel.run import Comparison, Report, Row, Verdict

SCHEMA = 1
_CASE_FIELDS = (
    "kind",
    "batch",
    "seq_lens",
    "query_lens",
    "query_heads",
    "kv_heads",
    "head_size",
    "rows",
    "query_rows",
    "dtype",
    "cache",
    "block_size",
    "table_factor",
    "run_rows",
    "planning",
    "group",
    "kv_bytes",
    "flops",
)
_ROW_FIELDS = (
    "system",
    "isa",
    "threads",
    "sets",
    "set_bytes",
    "gb_s",
    "gflops",
    "read_gb_s",
    "gemm_gflops",
    "share",
    "error",
    "ok",
    "ratios",
)


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_json(document: dict[str, Any], path: Path) -> None:
    """Writes a document; what is not finite becomes null, for strict readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_strict(document), indent=1, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def kernel_row(row: Row, report: Report) -> dict[str, Any]:
    """One row of the document."""
    return {
        "case": row.case.name,
        **{name: getattr(row.case, name) for name in _CASE_FIELDS},
        **{name: getattr(row, name) for name in _ROW_FIELDS},
        "ms": row.timing.ms,
        "ms_low": row.timing.low,
        "ms_high": row.timing.high,
        "ms_min": row.timing.best,
        "spread": row.timing.spread,
        "calls": row.timing.calls,
        "versions": report.versions,
        "cpu": report.machine.cpu,
    }


def kernel_document(report: Report) -> dict[str, Any]:
    """The whole run as plain data; see the module docstring."""
    return {
        "schema": SCHEMA,
        "benchmark": "kernel",
        "created": now(),
        "machine": report.machine._asdict(),
        "versions": report.versions,
        "notes": report.notes,
        "remarks": report.remarks,
        "failures": report.failures,
        "rows": [kernel_row(row, report) for row in report.rows],
        "goals": [
            {
                "case": verdict.case,
                "goal": str(verdict.goal),
                "metric": verdict.goal.metric,
                "bound": verdict.goal.bound,
                "against": verdict.goal.against,
                "value": verdict.value,
                "met": verdict.met,
            }
            for verdict in report.verdicts
        ],
        "comparisons": [
            {
                "group": c.group,
                "system": c.title,
                "cases": c.names,
                "ms": c.ms,
                "ms_min": c.best,
                "spread": c.spread,
                "spread_min": c.best_spread,
            }
            for c in report.comparisons
        ],
    }


def _milliseconds(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _rate(row: Row) -> str:
    if row.case.reads_bound or row.case.kind == "write":
        return f"{row.gb_s:.1f} GB/s"
    return f"{row.gflops:.0f} GFLOP/s"


def kernel_table(rows: list[Row]) -> Table:
    """One line per case and system."""
    peers = list(dict.fromkeys(row.title for row in rows if row.system != "bmc"))
    table = Table(box=box.SIMPLE_HEAD, title="Attention, one layer", title_justify="left")
    table.add_column("case")
    for name in ("dtype", "system"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "spread", "rate", "of ceiling", *(f"vs {p}" for p in peers), "error"):
        table.add_column(name, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        if before and row.case.name != before:
            table.add_section()
        first = row.case.name != before
        before = row.case.name
        error = f"{row.error:.0e}"
        ratios = [f"{row.ratios[p]:.2f}x" if p in row.ratios else "" for p in peers]
        table.add_row(
            escape(row.case.name) if first else "",
            row.case.dtype if first else "",
            row.title,
            _milliseconds(row.timing.ms),
            f"{row.timing.spread:.0%}",
            _rate(row),
            "" if row.share is None else f"{row.share:.0%}",
            *ratios,
            error if row.ok else f"[red]{error} wrong[/]",
            style="bold" if row.system == "bmc" else None,
        )
    return table


def _short(names: list[str]) -> list[str]:
    """Of `threads 2: decode ...` or `parts: chunk` the part that differs."""
    tails = [name.split(": ", 1)[-1] for name in names]
    return tails if len(set(tails)) == len(tails) else [name.split(": ", 1)[0] for name in names]


def comparison_table(comparisons: list[Comparison]) -> Table:
    """One line per group and system."""
    table = Table(box=box.SIMPLE_HEAD, title="Cases of one group", title_justify="left")
    table.add_column("group")
    table.add_column("system")
    table.add_column("ms of each case")
    table.add_column("largest over smallest", justify="right")
    table.add_column("of best calls", justify="right")
    for c in comparisons:
        times = ", ".join(
            f"{name} {_milliseconds(ms)}" for name, ms in zip(_short(c.names), c.ms, strict=True)
        )
        table.add_row(
            escape(c.group), c.title, escape(times), f"+{c.spread:.1%}", f"+{c.best_spread:.1%}"
        )
    return table


def verdict_table(verdicts: list[Verdict]) -> Table:
    """One line per goal."""
    table = Table(box=box.SIMPLE_HEAD, title="Goals on this machine", title_justify="left")
    table.add_column("case")
    table.add_column("goal")
    table.add_column("measured", justify="right")
    table.add_column("")
    for verdict in verdicts:
        value = "" if verdict.value is None else f"{verdict.value:.3g}"
        mark = {True: "[green]met[/]", False: "[yellow]not met[/]", None: "not measured"}
        table.add_row(escape(verdict.case), str(verdict.goal), value, mark[verdict.met])
    return table


def show_kernel(report: Report, console: Console) -> None:
    """Everything that a run found out."""
    machine = report.machine
    console.print(
        f"{machine.cpu}, {machine.cores} cores, L3 {machine.l3_bytes >> 20} MiB; "
        + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        highlight=False,
    )
    for note in report.notes:
        console.print(f"  {note}", highlight=False, markup=False)
    console.print(kernel_table(report.rows))
    for text in report.remarks:
        if "has no blocks" not in text and "its own blocks" not in text:
            console.print(f"  {text}", highlight=False, markup=False)
    if report.comparisons:
        console.print(comparison_table(report.comparisons))
    if report.verdicts:
        console.print(verdict_table(report.verdicts))
    for text in report.failures:
        console.print(text, style="bold red", markup=False, highlight=False)
