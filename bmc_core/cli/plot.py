"""The picture of a plan: cost against r, the chosen r marked. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from bmc_core.costs.spectrum import Spectrum


def draw(plan: Spectrum, path: Path, title: str) -> None:
    """Writes a PNG: growths, padding and their sum against r, and the memory kept in reserve.

    Raises:
        ImportError: matplotlib is not there.
        OSError: `path` cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [choice.r for choice in plan.choices]
    copies = [choice.prediction.copy_seconds for choice in plan.choices]
    padding = [choice.prediction.padding_seconds for choice in plan.choices]
    total = [a + b for a, b in zip(copies, padding, strict=True)]
    reserve = [choice.reserve_bytes / 2**20 for choice in plan.choices]
    figure, (costs, memory) = pyplot.subplots(
        2, 1, figsize=(9, 7), sharex=True, height_ratios=(2.2, 1), layout="constrained"
    )
    costs.plot(rows, total, color="#0b6e4f", lw=2.2, label="growths and padding")
    costs.plot(rows, copies, color="#c1440e", lw=1.2, ls="--", label="growths")
    if any(padding):
        costs.plot(rows, padding, color="#5b6c8f", lw=1.2, ls="-.", label="padding")
    chosen = plan.chosen
    spent = chosen.prediction.copy_seconds + chosen.prediction.padding_seconds
    costs.plot([chosen.r], [spent], "o", color="#0b6e4f", ms=9)
    right = chosen.r > rows[-1] / 3
    costs.annotate(
        f"r = {chosen.r}, T = {chosen.prediction.growths}\n{spent:.3g} s",
        (chosen.r, spent),
        xytext=(-14 if right else 14, 60),
        textcoords="offset points",
        ha="right" if right else "left",
        arrowprops={"arrowstyle": "-", "color": "grey"},
    )
    costs.set_ylabel("seconds")
    costs.set_yscale("log")
    positive = [value for value in total if value > 0]
    if positive:
        costs.set_ylim(min(positive) / 4, max(positive) * 2)
    costs.set_title(title)
    costs.legend()
    memory.plot(rows, reserve, color="#9a6fb0", lw=1.8)
    memory.plot([chosen.r], [chosen.reserve_bytes / 2**20], "o", color="#9a6fb0", ms=8)
    memory.set_ylabel("mean reserve, MiB")
    memory.set_ylim(bottom=0)
    memory.set_xlabel("r, rows per growth")
    memory.set_xscale("log", base=2)
    for axes in (costs, memory):
        axes.grid(True, which="major", alpha=0.3)
        axes.axvline(chosen.r, color="grey", lw=0.8, ls=":")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
