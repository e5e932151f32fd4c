"""What the commands have in common: options, how a run is shown, how its results leave.

Promises the exit codes 1 (an answer was wrong), 2 (an option is not allowed, said before any work,
or its file could not be written) and 3 (it cannot run here, or nothing could be measured); 4, a
mistake of the benchmark itself, is `__main__`'s. Importing it does not import torch. Knows no
command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from bmc_core.cli.options import make_console, progress_bar, require_writable, writing

if TYPE_CHECKING:
    from bmc_core.costs.measure import Progress

Options = TypeVar("Options")
Report = TypeVar("Report")

WIDTH = 150
"""Columns of the tables where there is no terminal."""
QUICK_SECONDS = 110.0
"""What a quick list may take on any machine, so that it ends within two minutes."""


class Cases(StrEnum):
    """Which list of cases."""

    quick = "quick"
    full = "full"


OnlyOption = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Only cases whose name contains a match.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="Threads of every system. Default: the cores of the affinity mask."),
]
GoalsOption = Annotated[
    bool,
    typer.Option(
        "--goals",
        help="Show the goals that hold for this machine's instruction sets, and where they are "
        "from. They are in the JSON in any case.",
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Write the results to this file.")
]
PlotOption = Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the picture.")]


def require_outputs(json: Path | None, plot: Path | None = None) -> None:
    """Says before the run, not after it, that a result cannot be written."""
    require_writable(json, "--json")
    require_writable(plot, "--plot")


def console() -> Console:
    """As wide as the terminal; wide enough for the tables where there is none."""
    return make_console(WIDTH)


NO_MEMORY = ("can't allocate memory", "not enough memory")
"""In what torch raises, a RuntimeError, where there is too little memory."""


def cannot(shown_on: Console, error: Exception) -> typer.Exit:
    """Says why it cannot run here; to be raised."""
    text = str(error) or type(error).__name__
    shown_on.print(f"error: {text}", style="bold red", markup=False, highlight=False)
    return typer.Exit(3)


def run_shown(
    run: Callable[[Options, Progress], Report],
    options: Options,
    shown_on: Console,
    *unable: type[Exception],
) -> Report:
    """A run under a progress bar; ends with 3 where it raises one of `unable`, or lacks memory or
    room on a disk."""
    with progress_bar(shown_on) as bar:
        task = bar.add_task("starting", total=1.0)
        try:
            return run(
                options, lambda text, done: bar.update(task, description=text, completed=done)
            )
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            bar.stop()
            lacks = isinstance(error, RuntimeError) and any(s in str(error) for s in NO_MEMORY)
            if lacks or isinstance(error, (OSError, MemoryError, *unable)):
                raise cannot(shown_on, error) from None
            raise


def hand_out(
    shown_on: Console,
    failures: Sequence[str],
    json: Path | None,
    document: Callable[[], dict[str, Any]],
    plot: Path | None = None,
    draw: Callable[[Path], object] | None = None,
    *,
    measured: bool = True,
) -> None:
    """Writes what was asked for; ends with 1 where an answer was wrong, with 3 where nothing was
    measured, with 2 where a file cannot be written.

    Args:
        document, draw: of the run; called only where their file was asked for. `draw` may raise
            ValueError: there is nothing to draw.
    """
    if json is not None:
        from benchmarks.lib.record import write

        found = document()
        with writing("--json", json):
            write(found, json)
        shown_on.print(f"results: {json}", highlight=False, markup=False)
    if plot is not None and draw is not None:
        try:
            with writing("--plot", plot):
                draw(plot)
        except ValueError as error:
            shown_on.print(str(error), markup=False)
        else:
            shown_on.print(f"picture: {plot}", highlight=False, markup=False)
    if failures:
        raise typer.Exit(1)
    if not measured:
        shown_on.print("error: nothing could be measured", style="bold red")
        raise typer.Exit(3)


def renamed(command: Callable[..., None], old: str, new: str) -> Callable[..., None]:
    """The command under its old name, which says on standard error what it is called now."""

    @functools.wraps(command)
    def under_old_name(**arguments: Any) -> None:
        typer.echo(f"python -m benchmarks {old} is now called {new}", err=True)
        command(**arguments)

    return under_old_name
