"""The growth benchmark's picture: predicted lines and measured points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.growth.curves import Curve
from benchmarks.growth.report import TITLES
from benchmarks.growth.run import Report


def draw(report: Report, path: Path) -> None:
    """Writes a PNG: for each attention and P predicted lines and measured points, and T* over N.

    Raises:
        OSError: `path` cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    options = report.options
    columns = len(options.prompts) + bool(report.slopes)
    figure, grid = pyplot.subplots(
        len(options.attentions),
        columns,
        figsize=(5.2 * columns, 3.9 * len(options.attentions)),
        squeeze=False,
        layout="constrained",
    )
    colors = pyplot.get_cmap("viridis")([i / len(options.lengths) for i in range(20)])
    for row, name in enumerate(options.attentions):
        for column, prompt in enumerate(options.prompts):
            axes = grid[row][column]
            chosen = [c for c in report.curves if (c.attention, c.prompt_rows) == (name, prompt)]
            for color, curve in zip(colors, chosen, strict=False):
                _draw_curve(axes, curve, color)
            axes.set_title(f"{TITLES[name]}, P = {prompt}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
            axes.set_xlabel("r, rows per growth")
            axes.set_ylabel("seconds")
            axes.grid(True, which="major", alpha=0.3)
            axes.legend(fontsize=8)
        for axes in grid[row][len(options.prompts) :]:
            chosen = [c for c in report.curves if c.attention == name]
            chosen = [c for c in chosen if c.measured_best is not None]
            _draw_growths(axes, report, chosen) if chosen else axes.set_axis_off()
    figure.suptitle("Generations against r\nmodel (lines), measured (points), picked r (rings)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")


def _draw_curve(axes: Any, curve: Curve, color: Any) -> None:
    rows = [point.r for point in curve.points]
    measured = [point.timing.ms / 1e3 for point in curve.points]
    errors = [
        [max(0.0, m - p.timing.low / 1e3) for p, m in zip(curve.points, measured, strict=True)],
        [max(0.0, p.timing.high / 1e3 - m) for p, m in zip(curve.points, measured, strict=True)],
    ]
    predicted = [point.predicted + curve.offset for point in curve.points]
    axes.plot(rows, predicted, color=color, lw=1.5)
    axes.errorbar(
        *(rows, measured, errors), fmt="o", ms=4, color=color, label=f"N = {curve.new_rows}"
    )
    picked = curve.picked
    axes.plot([picked.r], [picked.timing.ms / 1e3], "o", ms=11, mfc="none", color=color)


def _draw_growths(axes: Any, report: Report, curves: list[Curve]) -> None:
    for number, slope in enumerate(report.slopes):
        chosen = [curve for curve in curves if curve.prompt_rows == slope.prompt_rows]
        lengths = [curve.new_rows for curve in chosen]
        color = f"C{number}"
        axes.plot(lengths, [c.predicted_best for c in chosen], "-", color=color, lw=1.2)
        label = f"P = {slope.prompt_rows}: slope {slope.measured:.2f}, model {slope.predicted:.2f}"
        axes.plot(lengths, [c.measured_best for c in chosen], "o", color=color, label=label)
    axes.set_title("T*: model (lines), measured (points)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(report.options.lengths, [str(n) for n in report.options.lengths])
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("N, new rows")
    axes.set_ylabel("T*, growths")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
