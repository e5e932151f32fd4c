"""What the kernel benchmark prints and writes. Knows nothing of measuring."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.kernel.goals import Comparison
from benchmarks.kernel.rows import Row
from benchmarks.kernel.run import Report
from benchmarks.lib import goals, record

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
    "gemm_told",
    "share",
    "error",
    "ok",
    "ratios",
)


def document(report: Report) -> dict[str, Any]:
    """The run as plain data: the head of `lib/record.py`, and

    "settings": {cases, only, dtype, threads, seconds, limit, isa, pace_python},
    "notes": [text], "remarks": [text],
    "rows": [{case, kind, batch, seq_lens, query_lens, query_heads, kv_heads, head_size, rows,
              query_rows, dtype, cache, block_size, table_factor, run_rows, planning, group,
              system, isa, threads, ms, ms_low, ms_high, ms_min, spread, calls, sets, set_bytes,
              kv_bytes, flops, gb_s, gflops, read_gb_s, gemm_gflops, gemm_told, floor_ms,
              floor_binds, share, error, ok, ratios}],
    "comparisons": [{group, system, cases, ms, ms_min, spread, spread_min}]

    ms is the median, ms_low and ms_high are the quartiles, spread is their distance over the
    median (null below five calls). floor_ms is what reading K and V, or the products, takes at the
    ceilings, floor_binds which of the two ("reads", "products"); gemm_told is false where
    gemm_gflops is only of small products. share is of the ceiling that figures of this kind of
    case are held against (null for a write); ratios are a peer's median over this row's.
    """
    options = report.options
    return record.document(
        "kernel",
        report.record,
        {
            **options.selection._asdict(),
            "threads": options.threads,
            "seconds": options.seconds,
            "limit": options.limit,
            "isa": options.isa,
            "pace_python": options.pace_python and str(options.pace_python),
        },
        failures=report.failures,
        missing=report.missing,
        goals=goals.document(report.verdicts),
        notes=report.notes,
        remarks=report.remarks,
        rows=[_row(row) for row in report.rows],
        comparisons=[_comparison(comparison) for comparison in report.comparisons],
    )


def _row(row: Row) -> dict[str, Any]:
    return {
        "case": row.case.name,
        **{name: getattr(row.case, name) for name in _CASE_FIELDS},
        **{name: getattr(row, name) for name in _ROW_FIELDS},
        **row.timing.document("calls"),
        "floor_ms": row.floor.ms,
        "floor_binds": row.floor.binds,
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "group": comparison.group,
        "system": comparison.title,
        "cases": comparison.names,
        "ms": comparison.ms,
        "ms_min": comparison.best,
        "spread": comparison.spread,
        "spread_min": comparison.best_spread,
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
    for name in (
        "ms",
        "floor ms",
        "spread",
        "rate",
        "of ceiling",
        *(f"vs {p}" for p in peers),
        "error",
    ):
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
            str(row.floor) if first else "",
            f"{row.timing.spread:.0%}" if row.timing.told else "few calls",
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


def show(report: Report, console: Console, with_goals: bool = False) -> None:
    """Everything that a run found out."""
    console.print(report.record.head(), highlight=False)
    for note in report.notes:
        console.print(f"  {note}", highlight=False, markup=False)
    console.print(kernel_table(report.rows))
    for text in report.remarks:
        if "has no blocks" not in text and "its own blocks" not in text:
            console.print(f"  {text}", highlight=False, markup=False)
    if report.comparisons:
        console.print(comparison_table(report.comparisons))
    if with_goals:
        asked = {name for case in report.options.cases for name in (case.name, case.group)}
        shown = [v for v in report.verdicts if v.goal.case in asked]
        goals.show(shown, report.record.isas, console)
    for text in report.missing:
        console.print(f"not measured: {text}", highlight=False, markup=False)
    for text in report.failures:
        console.print(text, style="bold red", markup=False, highlight=False)
