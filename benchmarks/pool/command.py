"""The options of `python -m benchmarks pool`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from benchmarks.lib.command import (
    Cases,
    GoalsOption,
    JsonOption,
    PlotOption,
    cannot,
    console,
    hand_out,
    require_outputs,
    run_shown,
)
from benchmarks.pool.cases import FULL, QUICK, systems_for
from bmc_core.cli.options import refuse

BLOCK_ROWS = 16


def command(
    cases: Annotated[
        Cases,
        typer.Option(
            help="Mixed prompts for 32 and for 128 requests (two minutes), or also without prefix "
            "caching, in a tight pool, and conversations."
        ),
    ] = Cases.quick,
    turnovers: Annotated[
        int, typer.Option(min=2, help="How often as many rows are computed as the pool has.")
    ] = 12,
    block_size: Annotated[
        int, typer.Option(metavar="ROWS", help="Of BMC, and of vLLM beside it.")
    ] = 32,
    r: Annotated[int, typer.Option(metavar="ROWS", help="By which BMC grows.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    goals: GoalsOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """A worn KV pool: vLLM's scheduler with BMC's block managers and its own, without a model.

    Shows how often caches grow, how many blocks lie side by side, what that costs in prefix hits
    and in the scheduler's time. Ends with 1 when BMC admits or preempts otherwise than vLLM, 2
    when an option is not allowed, 3 when it cannot run here.
    """
    require_outputs(json, plot)
    if block_size < BLOCK_ROWS or block_size % BLOCK_ROWS:
        raise refuse("--block-size", f"{block_size}; allowed: multiples of {BLOCK_ROWS} rows")
    if r < block_size or r % block_size:
        raise refuse("--r", f"{r}; allowed: multiples of the block size, {block_size} rows")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    shown_on = console()
    try:
        from benchmarks.pool import plot as pictures
        from benchmarks.pool import report, run
    except ImportError as error:
        raise cannot(shown_on, error) from None
    loads = QUICK if cases is Cases.quick else FULL
    options = run.Options(loads, systems_for(block_size, r), turnovers, seed)
    found = run_shown(run.run, options, shown_on)
    report.show(found, shown_on, goals)
    hand_out(
        shown_on,
        found.failures,
        json,
        lambda: report.document(found),
        plot,
        lambda path: pictures.draw(found, path),
    )
