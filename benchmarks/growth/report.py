"""What the growth benchmark prints and writes. Knows nothing of measuring."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.growth.curves import Curve, Point, Slope
from benchmarks.growth.run import Report
from benchmarks.lib import goals, record
from benchmarks.lib.record import show_end
from benchmarks.lib.samples import percent, spread_of

TITLES = {"padded": "sdpa over padding", "sdpa": "sdpa over views", "native": "native kernel"}


def document(report: Report) -> dict[str, Any]:
    """The run as plain data: the head of `lib/record.py`, and

    "settings": {lengths, prompts, threads, rounds, batch_size, attentions, rows, shape},
    "calibration": {growth_rows, growth_packed, sdpa, padded, native, steps},
    "curves": [{attention, prompt_rows, new_rows, picked_r, fastest_r, loss,
                predicted_best_growths, measured_best_growths, offset_seconds,
                "points": [{r, growths, seconds, seconds_low, seconds_high,
                            seconds_min, spread, rounds, predicted_seconds, picked, up_front}]}],
    "slopes": [{prompt_rows, has_goal, measured, low, high, predicted}]

    has_goal is false where the prompt is too long for the paper's law. seconds is the sum over
    steps of the median over rounds; the quartiles, minimum and spread are of the rounds' own sums.
    predicted_seconds are growths, padding and reading; what does not depend on r is
    offset_seconds, the median of measured less predicted over a curve. loss is the picked r's time
    over the fastest one's, less 1.
    """
    options = report.options
    settings = {
        "lengths": list(options.lengths),
        "prompts": list(options.prompts),
        "threads": options.threads,
        "rounds": options.rounds,
        "batch_size": options.batch_size,
        "attentions": list(options.attentions),
        "rows": list(options.rows),
        "shape": asdict(options.shape),
    }
    return record.document(
        "growth",
        report.record,
        settings,
        failures=report.failures,
        missing=report.missing,
        goals=goals.document(report.verdicts),
        calibration=report.calibration.measured._asdict(),
        curves=[_curve(curve) for curve in report.curves],
        slopes=[slope._asdict() for slope in report.slopes],
    )


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "attention": curve.attention,
        "prompt_rows": curve.prompt_rows,
        "new_rows": curve.new_rows,
        "picked_r": curve.picked.r,
        "fastest_r": curve.fastest.r,
        "loss": curve.loss,
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
        "spread": spread_of(timing),
        "rounds": [ms / 1e3 for ms in point.rounds],
        "predicted_seconds": point.predicted,
        "picked": point.picked,
        "up_front": point.up_front,
    }


def curve_table(curves: list[Curve]) -> Table:
    """One line per (attention, P, N): the picked r beside the fastest."""
    table = Table(box=box.SIMPLE_HEAD, title="The r that the model picks", title_justify="left")
    table.add_column("attention")
    for name in ("P", "N", "picked r", "s", "spread", "fastest r", "s", "spread", "slower by"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("r=8 to all: s", "T* model", "T* measured"):
        table.add_column(name, justify="right", no_wrap=True)
    before = ""
    for curve in curves:
        if before and curve.attention != before:
            table.add_section()
        picked, fastest = curve.picked.timing, curve.fastest.timing
        times = [point.timing.ms / 1e3 for point in curve.points]
        padding = curve.measured_best is not None
        table.add_row(
            TITLES[curve.attention] if curve.attention != before else "",
            *(str(curve.prompt_rows), str(curve.new_rows), str(curve.picked.r)),
            *(f"{picked.ms / 1e3:.3f}", percent(spread_of(picked), 1), str(curve.fastest.r)),
            *(f"{fastest.ms / 1e3:.3f}", percent(spread_of(fastest), 1), f"{curve.loss:.1%}"),
            f"{times[0]:.2f} to {times[-1]:.2f}",
            f"{curve.predicted_best:.1f}" if padding else "",
            f"{curve.measured_best:.1f}" if padding else "",
        )
        before = curve.attention
    return table


def _law(slope: Slope) -> str:
    if slope.has_goal:
        return "the law T* ~ sqrt(N) says 0.5"
    return "the law T* ~ sqrt(N) is for prompts much shorter than N"


def show(report: Report, console: Console, with_goals: bool = False) -> None:
    """The tables, and what went wrong."""
    options, shape = report.options, report.options.shape
    console.print(report.record.head(), highlight=False)
    console.print(
        f"{options.threads} threads; Llama of {shape.layers} layers, {shape.kv_heads} KV heads of "
        f"{shape.head_size}, {shape.dtype}, batch {options.batch_size}; {options.rounds} rounds in "
        "turns",
        highlight=False,
    )
    console.print(curve_table(report.curves))
    for slope in report.slopes:
        console.print(
            f"P = {slope.prompt_rows}: log T* over log N has slope {slope.measured:.2f} "
            f"({slope.low:.2f} to {slope.high:.2f} without one of the rounds, model "
            f"{slope.predicted:.2f}); {_law(slope)}",
            highlight=False,
        )
    if with_goals:
        goals.show(report.verdicts, report.record.isas, console)
    lines = [f"not measured: {text}" for text in report.missing]
    show_end(console, report.record, lines, report.failures)
