"""The model benchmark's table, picture and JSON document.

    {"schema": 1, "benchmark": "model", "created", "machine", "versions",
     "settings": {lengths, prompts, threads, rounds, batch_size, paths, rows, shape},
     "calibration": {growth_rows, growth_packed, sdpa, padded, native, steps}, "failures": [text],
     "curves": [{path, prompt_rows, new_rows, picked_r, fastest_r, loss, goal, met,
                 predicted_best_growths, measured_best_growths, offset_seconds,
                 "points": [{r, growths, seconds, seconds_low, seconds_high,
                             seconds_min, spread, rounds, predicted_seconds, picked, up_front}]}],
     "slopes": [{prompt_rows, has_goal, measured, low, high, predicted, goal, margin, met}]}

met of a slope is null where the prompt is too long for the paper's law (has_goal false).
seconds is the sum over steps of the median over rounds; the quartiles, minimum and spread
are of the rounds' own sums. predicted_seconds are growths, padding and reading; what does not
depend on r is offset_seconds, the median of measured less predicted over a curve. loss is the
picked r's time over the fastest one's, less 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.growth.run import MAX_LOSS, SLOPE, SLOPE_MARGIN, Curve, ModelReport, Point, Slope
from bmc_core.machine.load import BUSY

SCHEMA = 1
_TITLES = {"padded": "sdpa over padding", "sdpa": "sdpa over views", "native": "native kernel"}


def model_document(report: ModelReport, created: str) -> dict[str, Any]:
    """The run as plain data; see the module docstring."""
    options = report.options
    return {
        "schema": SCHEMA,
        "benchmark": "model",
        "created": created,
        "machine": report.machine._asdict(),
        "versions": report.versions,
        "settings": {
            "lengths": list(options.lengths),
            "prompts": list(options.prompts),
            "threads": options.threads,
            "rounds": options.rounds,
            "batch_size": options.batch_size,
            "paths": list(options.paths),
            "rows": list(options.rows),
            "shape": options.shape._asdict(),
        },
        "calibration": report.calibration.measured._asdict(),
        "failures": report.failures,
        "curves": [_curve(curve) for curve in report.curves],
        "slopes": [
            {**slope._asdict(), "goal": SLOPE, "margin": SLOPE_MARGIN, "met": slope.met}
            for slope in report.slopes
        ],
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "path": curve.path,
        "prompt_rows": curve.prompt_rows,
        "new_rows": curve.new_rows,
        "picked_r": curve.picked.r,
        "fastest_r": curve.fastest.r,
        "loss": curve.loss,
        "goal": MAX_LOSS,
        "met": curve.loss <= MAX_LOSS,
        "predicted_best_growths": curve.predicted_best,
        "measured_best_growths": curve.measured_best,
        "offset_seconds": curve.offset,
        "points": [_point(point) for point in curve.points],
    }


def _point(point: Point) -> dict[str, Any]:
    timing = point.timing
    return {
        "r": point.r,
        "growths": point.growths,
        "seconds": timing.ms / 1e3,
        "seconds_low": timing.low / 1e3,
        "seconds_high": timing.high / 1e3,
        "seconds_min": timing.best / 1e3,
        "spread": timing.spread,
        "rounds": [ms / 1e3 for ms in point.rounds],
        "predicted_seconds": point.predicted,
        "picked": point.picked,
        "up_front": point.up_front,
    }


def _mark(met: bool) -> str:
    return "[green]met[/]" if met else "[yellow]not met[/]"


def _verdict(slope: Slope) -> str:
    if slope.met is None:
        return "no goal: the law T* ~ sqrt(N) is for prompts much shorter than N"
    return f"goal {SLOPE} +- {SLOPE_MARGIN}: {_mark(slope.met)}"


def curve_table(curves: list[Curve]) -> Table:
    """One line per (path, P, N): the picked r beside the fastest."""
    table = Table(box=box.SIMPLE_HEAD, title="The r that the model picks", title_justify="left")
    table.add_column("path")
    for name in ("P", "N", "picked r", "s", "spread", "fastest r", "s", "spread", "slower by"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (f"<= {MAX_LOSS:.0%}", "r=8 to all: s", "T* model", "T* measured"):
        table.add_column(name, justify="right", no_wrap=True)
    before = ""
    for curve in curves:
        if before and curve.path != before:
            table.add_section()
        picked, fastest = curve.picked.timing, curve.fastest.timing
        times = [point.timing.ms / 1e3 for point in curve.points]
        padding = curve.measured_best is not None
        table.add_row(
            _TITLES[curve.path] if curve.path != before else "",
            *(str(curve.prompt_rows), str(curve.new_rows), str(curve.picked.r)),
            *(f"{picked.ms / 1e3:.3f}", f"{picked.spread:.1%}", str(curve.fastest.r)),
            *(f"{fastest.ms / 1e3:.3f}", f"{fastest.spread:.1%}", f"{curve.loss:.1%}"),
            _mark(curve.loss <= MAX_LOSS),
            f"{times[0]:.2f} to {times[-1]:.2f}",
            f"{curve.predicted_best:.1f}" if padding else "",
            f"{curve.measured_best:.1f}" if padding else "",
        )
        before = curve.path
    return table


def show_model(report: ModelReport, console: Console) -> None:
    """The tables, and what went wrong."""
    options, shape = report.options, report.options.shape
    console.print(
        f"{report.machine.cpu}, {options.threads} threads; Llama of {shape.layers} layers, "
        f"{shape.kv_heads} KV heads of {shape.head_size}, float32, batch {options.batch_size}; "
        f"{options.rounds} rounds in turns",
        highlight=False,
    )
    console.print(curve_table(report.curves))
    for slope in report.slopes:
        console.print(
            f"P = {slope.prompt_rows}: log T* over log N has slope {slope.measured:.2f} "
            f"({slope.low:.2f} to {slope.high:.2f} without one of the rounds, model "
            f"{slope.predicted:.2f}); {_verdict(slope)}",
            highlight=False,
        )
    others = report.machine.others
    if others is not None and others > BUSY:
        console.print(
            f"Other processes took {others:.0%} of the cores during the run: spreads are larger "
            "than they need be.",
            highlight=False,
        )
    for text in report.failures:
        console.print(text, style="bold red", markup=False, highlight=False)


def draw_model(report: ModelReport, path: Path) -> None:
    """Writes a PNG: for each path and P predicted lines and measured points, and T* over N.

    Raises:
        OSError: `path` cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    options = report.options
    columns = len(options.prompts) + bool(report.slopes)
    figure, grid = pyplot.subplots(
        len(options.paths),
        columns,
        figsize=(5.2 * columns, 3.9 * len(options.paths)),
        squeeze=False,
        layout="constrained",
    )
    colors = pyplot.get_cmap("viridis")([i / len(options.lengths) for i in range(20)])
    for row, name in enumerate(options.paths):
        for column, prompt in enumerate(options.prompts):
            axes = grid[row][column]
            chosen = [c for c in report.curves if (c.path, c.prompt_rows) == (name, prompt)]
            for color, curve in zip(colors, chosen, strict=False):
                _draw_curve(axes, curve, color)
            axes.set_title(f"{_TITLES[name]}, P = {prompt}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
            axes.set_xlabel("r, rows per growth")
            axes.set_ylabel("seconds")
            axes.grid(True, which="major", alpha=0.3)
            axes.legend(fontsize=8)
        for axes in grid[row][len(options.prompts) :]:
            chosen = [c for c in report.curves if c.path == name and c.measured_best is not None]
            _draw_growths(axes, report, chosen) if chosen else axes.set_axis_off()
    figure.suptitle("Generations against r: model (lines), measured (points), picked r (rings)")
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


def _draw_growths(axes: Any, report: ModelReport, curves: list[Curve]) -> None:
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
