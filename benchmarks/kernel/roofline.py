"""The roofline picture: what was measured, under the machine's two ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel.rows import Row

_MARKS = {"bmc": "o", "cpu_attn": "s", "sdpa": "^", "slabpool": "D"}
_COLORS = {"bmc": "#0b6e4f", "cpu_attn": "#c1440e", "sdpa": "#5b6c8f", "slabpool": "#9a6fb0"}
_LINES = {"bfloat16": "-", "float16": "-.", "float32": "--"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG; writes of rows are no arithmetic and left out.

    x is arithmetic intensity, FLOP per byte of K and V; y is GFLOP/s; both logarithmic.

    Raises:
        ValueError: there is nothing to draw.
        OSError: `path` cannot be written.
    """
    shown = [row for row in rows if row.case.flops and not row.case.group]
    shown = shown or [row for row in rows if row.case.flops]
    if not shown:
        raise ValueError("--plot: no case with arithmetic was measured; nothing to draw")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    axes.set_xscale("log")
    axes.set_yscale("log")
    threads = max(row.threads for row in shown)
    _draw_ceilings(axes, shown, [row for row in shown if row.threads == threads])
    _draw_points(axes, shown)
    axes.set_xlabel("arithmetic intensity, FLOP per byte of K and V")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Attention, one layer: measured medians on {threads} threads")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def _intensity(row: Row) -> float:
    return row.case.flops / row.case.kv_bytes


def _draw_ceilings(axes: Any, shown: Sequence[Row], most: Sequence[Row]) -> None:
    """Both ceilings of the rows `most` and the bend between them are always in the picture."""
    read = most[0].read_gb_s
    peaks = {row.case.dtype: row.gemm_gflops for row in most}
    left = min(min(map(_intensity, shown)), 1.0) / 1.5
    right = 3 * max(max(map(_intensity, shown)), max(peaks.values()) / read)
    labelled: set[str] = set()
    for dtype, peak in sorted(peaks.items()):
        bend = peak / read
        xs = [left, bend, right] if left < bend < right else [left, right]
        ys = [min(read * x, peak) for x in xs]
        axes.plot(xs, ys, _LINES.get(dtype, "-"), color="black", lw=1.4, zorder=1)
        if ys[-1] >= peak and dtype not in labelled:
            same = [other for other in sorted(peaks) if 0.95 < peaks[other] / peak < 1.05]
            labelled.update(same)
            higher = any(1.05 * peak < other < 1.3 * peak for other in peaks.values())
            text = f"{', '.join(same)} GEMM {peak:.0f} GFLOP/s"
            _label_peak(axes, text, (right, peak), higher)
    axes.set_xlim(left, right)
    lowest = min(min(row.gflops for row in shown), read * left)
    axes.set_ylim(lowest / 1.5, 1.8 * max(*peaks.values(), *(row.gflops for row in shown)))
    # Along the line: what slope it has on the page, only the transform of the data knows.
    axes.text(
        left * 1.2,
        read * left * 1.2 * 1.15,
        f"read bandwidth {read:.1f} GB/s",
        fontsize=9,
        rotation=math.degrees(math.atan2(read, 1)),
        rotation_mode="anchor",
        transform_rotates_text=True,
    )


def _label_peak(axes: Any, text: str, place: tuple[float, float], below: bool) -> None:
    """Under its line where another one is close above."""
    axes.annotate(
        text,
        place,
        xytext=(-6, -4 if below else 4),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        fontsize=9,
    )


def _draw_points(axes: Any, shown: Sequence[Row]) -> None:
    """One mark and color per system; full for bfloat16, pale for float16, hollow for float32."""
    for system, title in {row.system: row.title for row in shown}.items():
        color = _COLORS.get(system, "grey")
        fills = {"bfloat16": color, "float16": (color, 0.3), "float32": "none"}
        for dtype, fill in fills.items():
            points = [r for r in shown if r.system == system and r.case.dtype == dtype]
            if not points:
                continue
            axes.scatter(
                [_intensity(row) for row in points],
                [row.gflops for row in points],
                marker=_MARKS.get(system, "x"), s=46, zorder=3,
                edgecolors=color, linewidths=1.3, facecolors=fill,
                label=title if dtype == "bfloat16" else f"{title} {dtype}",
            )  # fmt: skip
