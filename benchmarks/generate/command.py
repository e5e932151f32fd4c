"""The options of `python -m benchmarks generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.engines import HUGGING_FACE
from benchmarks.lib.command import (
    QUICK_SECONDS,
    Cases,
    GoalsOption,
    JsonOption,
    ThreadsOption,
    console,
    hand_out,
    require_outputs,
    run_shown,
)
from bmc_core.cli.options import refuse, threads_or_cores

CasesOption = Annotated[
    Cases,
    typer.Option(
        help="Three cases (within two minutes), or the grid of twelve that averages are of."
    ),
]
LlamaCppOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Python of an environment with llama-cpp-python and gguf: llama.cpp is timed too.",
    ),
]


def command(
    cases: CasesOption = Cases.quick,
    systems: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Only these, by commas. Default: all that can run."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="With --rows: this one case instead.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="With --batch: this one case instead.")
    ] = None,
    r: Annotated[int, typer.Option("--r", min=2, help="Rows per growth of BMC's cache.")] = 128,
    rounds: Annotated[
        int, typer.Option(min=2, help="Turns of each system: 2 steps of a peer, 6 of BMC.")
    ] = 5,
    threads: ThreadsOption = None,
    llama_cpp_python: LlamaCppOption = None,
    goals: GoalsOption = False,
    json: JsonOption = None,
) -> None:
    """A decode step of Hugging Face generation: BMC, transformers' caches and DeepSpeed in turns.

    Ends with 1 when an answer differs, 2 when an option is not allowed, 3 when nothing could be
    measured here.
    """
    require_outputs(json)
    names = HUGGING_FACE if systems is None else tuple(systems.split(","))
    unknown = [name for name in names if name not in HUGGING_FACE]
    if unknown:
        raise refuse("--systems", f"{', '.join(unknown)}; allowed: {', '.join(HUGGING_FACE)}")
    if (batch is None) != (rows is None):
        raise refuse("--batch and --rows", "one without the other; allowed: both or none")
    count = threads_or_cores(threads)
    from benchmarks.generate import report, run
    from benchmarks.generate.cases import FULL, QUICK, GenerateCase
    from benchmarks.lib.worker_client import WorkerError

    chosen = FULL if cases is Cases.full else QUICK
    if batch is not None and rows is not None:
        chosen = (GenerateCase(batch, rows),)
    options = run.Options(
        chosen,
        count,
        names,
        r,
        rounds,
        llama_cpp_python=llama_cpp_python,
        seconds=QUICK_SECONDS if chosen is QUICK else None,
    )
    shown_on = console()
    found = run_shown(run.run, options, shown_on, WorkerError)
    report.show(found, shown_on, goals)
    hand_out(
        shown_on,
        found.failures,
        json,
        lambda: report.document(found),
        measured=bool(found.rows),
    )
