"""The options of `python -m benchmarks sampling`."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from benchmarks.lib.command import (
    GoalsOption,
    JsonOption,
    OnlyOption,
    ThreadsOption,
    cannot,
    console,
    hand_out,
    require_outputs,
    run_shown,
)
from benchmarks.sampling.cases import CASES
from bmc_core.cli.options import refuse


def command(
    only: OnlyOption = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Timed seconds, each case.")] = 1.5,
    threads: ThreadsOption = None,
    goals: GoalsOption = False,
    json: JsonOption = None,
) -> None:
    """A step's sampling: BMC's samplers and vLLM's in turns, with draft tokens and without.

    Ends with 1 when tokens were wrong, 2 when an option is not allowed, 3 when it cannot run here.
    """
    require_outputs(json)
    cases = [case for case in CASES if re.search(only or "", case.name)]
    if not cases:
        names = ", ".join(case.name for case in CASES)
        raise refuse("--only", f"{only!r}; allowed: part of {names}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    shown_on = console()
    try:
        from benchmarks.sampling import report, run
    except ImportError as error:
        raise cannot(shown_on, error) from None
    from bmc_core.machine.cpu import num_cores

    cores = num_cores()
    if threads is not None and not 1 <= threads <= cores:
        raise refuse("--threads", f"{threads}; allowed: 1 to {cores}")
    found = run_shown(run.run, run.Options(cases, seconds, threads or cores), shown_on)
    report.show(found, shown_on, goals)
    hand_out(shown_on, found.failures, json, lambda: report.document(found))
