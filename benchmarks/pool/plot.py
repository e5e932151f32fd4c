"""The pool benchmark's picture: neighbors and growths, turnover by turnover."""

from __future__ import annotations

from pathlib import Path

from benchmarks.pool.run import Report


def draw(report: Report, path: Path) -> None:
    """Writes a PNG: a column a load, above the share of adjacent blocks, below the growths.

    Raises:
        OSError: `path` cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    loads = list(dict.fromkeys(row.load for row in report.rows))
    figure, grid = pyplot.subplots(
        2,
        len(loads),
        figsize=(4.6 * len(loads), 6.4),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    turnovers = range(1, report.options.turnovers + 1)
    for column, load in enumerate(loads):
        above, below = grid[0][column], grid[1][column]
        for row in report.rows:
            if row.load is not load:
                continue
            width = 2.4 if row.system.r else 1.4
            style = {"label": row.system.title, "linewidth": width, "marker": ".", "markersize": 6}
            above.plot(turnovers, [100 * one.adjacent for one in row.turnovers], **style)
            below.plot(turnovers, [one.growths for one in row.turnovers], **style)
        above.set_title(load.name)
        above.set_ylim(0, 100)
        below.set_ylim(bottom=0)
        below.set_xlabel("turnovers of the pool")
        for axes in (above, below):
            axes.grid(True, alpha=0.3)
    grid[0][0].set_ylabel("adjacent neighbors in block tables, %")
    grid[1][0].set_ylabel("growths per 1000 decoded tokens")
    grid[1][0].legend(fontsize=8)
    figure.suptitle("A KV pool that is used over and over")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
