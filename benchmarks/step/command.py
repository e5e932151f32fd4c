"""The options of `python -m benchmarks step`."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import typer

from benchmarks.lib.command import (
    GoalsOption,
    JsonOption,
    OnlyOption,
    console,
    hand_out,
    require_outputs,
    run_shown,
)
from bmc_core.cli.options import refuse


class Pool(StrEnum):
    """Which KV pools are measured."""

    worn = "worn"
    virgin = "virgin"
    both = "both"


def command(
    only: OnlyOption = None,
    bind: Annotated[
        str | None,
        typer.Option(
            metavar="CPUS",
            help="VLLM_CPU_OMP_THREADS_BIND of both engines, as 0-3,8. Default: every CPU of the "
            "affinity mask.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps in a turn.")] = 6,
    compile_model: Annotated[
        bool, typer.Option("--compile/--eager", help="With torch.compile, or without.")
    ] = False,
    prefill: Annotated[
        bool,
        typer.Option(
            "--prefill/--drawn",
            help="Fill the KV cache by running the prompts through the model (minutes), or with "
            "drawn rows that each backend writes by itself.",
        ),
    ] = False,
    pool: Annotated[
        Pool,
        typer.Option(
            help="KV pool: worn (used through ten times by mixed requests, as a server's after "
            "hours), virgin (new), or both."
        ),
    ] = Pool.both,
    goals: GoalsOption = False,
    json: JsonOption = None,
) -> None:
    """A whole decode step of vLLM: BMC against CPU_ATTN, two engines alive, stepped in turns.

    Ends with 1 when the answers differ or are not finite, 2 when an option is not allowed, 3
    when an engine cannot run here.
    """
    require_outputs(json)
    if bind is not None and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", bind):
        raise refuse("--bind", f"{bind!r}; allowed: CPU numbers and ranges, as 0-3,8")
    from benchmarks.lib.worker_client import WorkerError
    from benchmarks.step import report, run
    from benchmarks.step.cases import select

    try:
        cases = select(only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    options = run.Options(
        cases,
        bind or run.default_bind(),
        rounds,
        steps,
        compile_model,
        not prefill,
        run.POOLS if pool is Pool.both else (str(pool),),
    )
    shown_on = console()
    found = run_shown(run.run, options, shown_on, WorkerError, MemoryError)
    report.show(found, shown_on, goals)
    hand_out(shown_on, found.failures, json, lambda: report.document(found))
