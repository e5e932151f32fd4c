"""The options of `python -m benchmarks growth`."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.lib.command import (
    QUICK_SECONDS,
    Cases,
    GoalsOption,
    JsonOption,
    PlotOption,
    ThreadsOption,
    cannot,
    console,
    hand_out,
    require_outputs,
    run_shown,
)
from bmc_core.cli.options import Attention, refuse, threads_or_cores

LENGTHS = {Cases.quick: (128, 256, 512), Cases.full: (128, 256, 512, 1024)}
PROMPTS = {Cases.quick: (16,), Cases.full: (16, 256)}

CasesOption = Annotated[
    Cases,
    typer.Option(
        help="N up to 512 after a short prompt (within two minutes), or up to 1024 and a "
        "longer one too."
    ),
]
AttentionOption = Annotated[
    list[Attention] | None,
    typer.Option(
        "--attention",
        "--path",
        help="How steps attend: padded (sdpa over every row that is held), sdpa (over views of "
        "the valid rows) or native. May be given again. Default: all three. --path is its old "
        "name.",
    ),
]
PromptOption = Annotated[
    list[int] | None,
    typer.Option(
        metavar="ROWS",
        help="P, rows of the prompt. May be given again. Default: 16, and 256 with full.",
    ),
]


def command(
    cases: CasesOption = Cases.quick,
    attention: AttentionOption = None,
    prompt: PromptOption = None,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every generation is run.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    goals: GoalsOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """The analytical model: r swept over real generations of transformers, against its prediction.

    Ends with 1 when tokens are wrong, 2 when an option is not allowed, 3 when it cannot run here.
    """
    require_outputs(json, plot)
    count = threads_or_cores(threads)
    for rows in prompt or ():
        if rows < 1:
            raise refuse("--prompt", f"{rows}; allowed: at least 1 row")
    shown_on = console()
    try:
        from benchmarks.growth import plot as pictures
        from benchmarks.growth import report, run
        from benchmarks.growth.cases import ATTENTIONS, Options
    except ImportError as error:
        raise cannot(shown_on, error) from None
    options = Options(
        LENGTHS[cases],
        tuple(dict.fromkeys(prompt)) if prompt else PROMPTS[cases],
        count,
        rounds,
        batch,
        tuple(dict.fromkeys(map(str, attention))) if attention else ATTENTIONS,
        seconds=QUICK_SECONDS if cases is Cases.quick else None,
    )
    found = run_shown(run.run, options, shown_on, MemoryError, RuntimeError)
    report.show(found, shown_on, goals)
    hand_out(
        shown_on,
        found.failures,
        json,
        lambda: report.document(found),
        plot,
        lambda path: pictures.draw(found, path),
        measured=bool(found.curves),
    )
