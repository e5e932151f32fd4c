"""The options of `python -m benchmarks overhead`."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.lib.command import (
    GoalsOption,
    JsonOption,
    cannot,
    console,
    hand_out,
    require_outputs,
    run_shown,
)
from bmc_core.cli.options import refuse

IsaOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Instruction set of BMC. Default: the best."),
]


def command(
    isa: IsaOption = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Timed seconds, all together.")] = 3.0,
    goals: GoalsOption = False,
    json: JsonOption = None,
) -> None:
    """What a layer of vLLM costs before anything is computed: BMC and CPU_ATTN in turns.

    One token of one short sequence is written and attended, through the classes that vLLM calls;
    BMC's kernels alone stand beside. Ends with 1 when an answer was wrong, 2 when an option is not
    allowed, 3 when it cannot run here.
    """
    require_outputs(json)
    shown_on = console()
    try:
        from benchmarks.overhead import report, run
    except ImportError as error:
        raise cannot(shown_on, error) from None
    from bmc_core import native

    usable = native.usable_isas() if native.load_error() is None else []
    if isa is not None and isa not in usable:
        raise refuse("--isa", f"{isa}; allowed here: {', '.join(usable)}")
    found = run_shown(run.run, run.Options(seconds, isa), shown_on)
    report.show(found, shown_on, goals)
    hand_out(shown_on, found.failures, json, lambda: report.document(found))
