"""The options of `python -m benchmarks speculation`."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import typer

from benchmarks.lib.command import (
    QUICK_SECONDS,
    Cases,
    GoalsOption,
    JsonOption,
    OnlyOption,
    PlotOption,
    console,
    hand_out,
    require_outputs,
    run_shown,
)
from bmc_core.cli.options import refuse


class OpenMP(StrEnum):
    """Which runtime vLLM's processes preload."""

    libgomp = "libgomp"
    libiomp5 = "libiomp5"


CasesOption = Annotated[
    Cases,
    typer.Option(
        help="Small models (within two minutes), or the models and shapes that the goals are for."
    ),
]


def command(
    cases: CasesOption = Cases.quick,
    only: OnlyOption = None,
    bind: Annotated[
        str | None,
        typer.Option(
            metavar="CPUS",
            help="VLLM_CPU_OMP_THREADS_BIND of all engines, as 0-3,8. Default: every CPU of the "
            "affinity mask.",
        ),
    ] = None,
    openmp: Annotated[
        OpenMP,
        typer.Option(help="Runtime that vLLM's processes preload: torch's own, or Intel's."),
    ] = OpenMP.libgomp,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each system.")] = 3,
    goals: GoalsOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Draft tokens: BMC's controller beside fixed lengths, and beside the frameworks' own.

    Ends with 1 when outputs differ that must not, 2 when an option is not allowed, 3 when nothing
    could be measured here.
    """
    require_outputs(json, plot)
    if bind is not None and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", bind):
        raise refuse("--bind", f"{bind!r}; allowed: CPU numbers and ranges, as 0-3,8")
    from benchmarks.lib.worker_client import WorkerError
    from benchmarks.speculation import plot as pictures
    from benchmarks.speculation import report, run
    from benchmarks.speculation.cases import FULL, QUICK, select

    quick = cases is Cases.quick
    try:
        chosen, controller = select(QUICK if quick else FULL, only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    options = run.Options(
        chosen,
        bind or run.default_bind(),
        str(openmp),
        rounds,
        controller,
        seconds=QUICK_SECONDS if quick else None,
    )
    shown_on = console()
    found = run_shown(run.run, options, shown_on, WorkerError)
    report.show(found, shown_on, goals)
    hand_out(
        shown_on,
        found.failures,
        json,
        lambda: report.document(found),
        plot,
        lambda path: pictures.draw(found, path),
        measured=bool(found.rows or found.controller),
    )
