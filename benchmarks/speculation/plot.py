"""The speculation benchmark's picture: tokens per second against draft tokens, choices marked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.engines.speculating.base import AUTO, NONE
from benchmarks.speculation.rows import Row
from benchmarks.speculation.run import Report

COLUMNS = 3


def draw(report: Report, path: Path) -> None:
    """Writes a PNG: a panel a case; fixed lengths of a system as a line, the controller's choice as
    a star at its mean length, a framework's own as a diamond.

    Raises:
        OSError: `path` cannot be written.
        ValueError: no case was measured.
    """
    cases = [case for case in report.options.cases if any(r.case is case for r in report.rows)]
    if not cases:
        raise ValueError("no picture: no case was measured")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4.8 * columns, 3.8 * lines), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for axes, case in zip(panels, cases, strict=False):
        rows = [row for row in report.rows if row.case is case]
        for number, system in enumerate(dict.fromkeys(row.system for row in rows)):
            _system(axes, [row for row in rows if row.system == system], f"C{number}")
        axes.set_title(case.name, fontsize=10)
        axes.set_xlabel("draft tokens of a step")
        axes.set_ylabel("tokens per second")
        axes.set_ylim(bottom=0)
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=7)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    figure.suptitle("Fixed draft lengths (lines) and what is chosen by step (stars)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _system(axes: Any, rows: list[Row], color: str) -> None:
    fixed = sorted((0 if row.length == NONE else row.length, row) for row in rows if row.fixed)
    points = [(k, row.tokens_per_second) for k, row in fixed]
    axes.plot(*zip(*points, strict=True), "o-", ms=4, color=color, label=rows[0].title)
    for row in rows:
        if row.fixed:
            continue
        at = 0.0 if math.isnan(row.mean_length) else row.mean_length
        mark = "*" if row.length == AUTO else "D"
        axes.plot(
            [at], [row.tokens_per_second], mark, ms=12 if row.length == AUTO else 6, color=color,
            markeredgecolor="black", label=f"{row.title}, {row.length}: {at:.1f}",
        )  # fmt: skip
        axes.axhline(row.tokens_per_second, ls=":", lw=0.8, color=color)
