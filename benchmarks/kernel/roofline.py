"""The roofline picture: what was measured, under the machine's two ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernel.run import Row

_MARKS = {"bmc": "o", "cpu_attn": "s", "sdpa": "^", "slabpool": "D"}
_COLORS = {"bmc": "#0b6e4f", "cpu_attn": "#c1440e", "sdpa": "#5b6c8f", "slabpool": "#9a6fb0"}
_LINES = {"bfloat16": "-", "float16": "-.", "float32": "--"}


def _fill(color: str, dtype: str) -> str | tuple[str, float]:
    """Full for bfloat16, pale for float16, none for float32."""
    if dtype == "float16":
        return color, 0.3
    return color if dtype == "bfloat16" else "none"


def roofline(rows: Sequence[Row], path: Path) -> None:
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
    marks = {row.case.flops / row.case.kv_bytes for row in shown}
    threads = max(row.threads for row in shown)
    most = [row for row in shown if row.threads == threads]
    read = most[0].read_gb_s
    peaks = {row.case.dtype: row.gemm_gflops for row in most}
    # Both ceilings and the bend between them are always in the picture.
    left = min(min(marks), 1.0) / 1.5
    right = 3 * max(max(marks), max(peaks.values()) / read)
    for dtype, peak in sorted(peaks.items()):
        bend = peak / read
        xs = [left, bend, right] if left < bend < right else [left, right]
        ys = [min(read * x, peak) for x in xs]
        axes.plot(xs, ys, _LINES.get(dtype, "-"), color="black", lw=1.4, zorder=1)
        if ys[-1] < peak:
            continue
        higher = [p for p in peaks.values() if peak < p < 1.3 * peak]
        axes.annotate(
            f"{dtype} GEMM {peak:.0f} GFLOP/s",
            (right, peak),
            xytext=(-6, -4 if higher else 4),
            textcoords="offset points",
            ha="right",
            va="top" if higher else "bottom",
            fontsize=9,
        )
    axes.set_xlim(left, right)
    lowest = min(min(row.gflops for row in shown), read * left)
    axes.set_ylim(lowest / 1.5, 1.8 * max(*peaks.values(), *(row.gflops for row in shown)))
    x = left * 1.5
    axes.annotate(
        f"read bandwidth {read:.1f} GB/s",
        (x, read * x),
        xytext=(-5, 5),
        textcoords="offset points",
        fontsize=9,
        rotation=math.degrees(math.atan2(read, 1)),
        rotation_mode="anchor",
        transform_rotates_text=True,
    )
    titles = {row.system: row.title for row in shown}
    for system, title in titles.items():
        for dtype in _LINES:
            points = [r for r in shown if r.system == system and r.case.dtype == dtype]
            if not points:
                continue
            axes.scatter(
                [r.case.flops / r.case.kv_bytes for r in points],
                [r.gflops for r in points],
                marker=_MARKS.get(system, "x"), s=46, zorder=3,
                edgecolors=_COLORS.get(system, "grey"), linewidths=1.3,
                facecolors=_fill(_COLORS.get(system, "grey"), dtype),
                label=title if dtype == "bfloat16" else f"{title} {dtype}",
            )  # fmt: skip
    axes.set_xlabel("arithmetic intensity, FLOP per byte of K and V")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Attention, one layer: measured medians on {threads} threads")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
