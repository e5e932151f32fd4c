"""The options of `python -m benchmarks kernel`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.lib.command import (
    QUICK_SECONDS,
    Cases,
    GoalsOption,
    JsonOption,
    OnlyOption,
    PlotOption,
    ThreadsOption,
    console,
    hand_out,
    require_outputs,
    run_shown,
)
from bmc_core.cli.options import Dtype, refuse, threads_or_cores

SECONDS = {Cases.quick: 1.2, Cases.full: 6.0}

CasesOption = Annotated[
    Cases,
    typer.Option(help="Those that goals are of (within two minutes), or more shapes, groups."),
]
IsaOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Instruction set of BMC and of CPU_ATTN: amx_bf16, avx512_bf16, avx512, avx2 or "
        "portable (CPU_ATTN: avx2). Default: the best of each.",
    ),
]
SecondsOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Timed seconds per case, all systems together. Default: 1.2 quick, 6 full.",
    ),
]
PaceOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Python of an environment with AMD's pace-vllm: its SlabPool is timed too.",
    ),
]


def command(
    cases: CasesOption = Cases.quick,
    only: OnlyOption = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Every case in this dtype; default: each in its own.")
    ] = None,
    isa: IsaOption = None,
    threads: ThreadsOption = None,
    seconds: SecondsOption = None,
    pace_python: PaceOption = None,
    goals: GoalsOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Attention of one layer: BMC, vLLM's CPU_ATTN and torch's sdpa, alternating call by call.

    Each system walks over rotating sets larger than four L3 caches, after this machine's read
    bandwidth and GEMM rate were measured. Ends with 1 when an answer was wrong, 2 when an option
    is not allowed, 3 when a system cannot run here or nothing was measured.
    """
    require_outputs(json, plot)
    count = threads_or_cores(threads)
    if isa is not None:
        _require_usable(isa)
    from benchmarks.kernel import report, roofline, run
    from benchmarks.kernel.cases import select
    from benchmarks.kernel.operators import Unusable

    try:
        chosen = select(cases.value, count, only, dtype.value if dtype else None)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    options = run.Options(
        chosen,
        count,
        SECONDS[cases] if seconds is None else seconds,
        limit=QUICK_SECONDS if cases is Cases.quick else None,
        selection=run.Selection(cases.value, only, dtype.value if dtype else None),
        isa=isa,
        pace_python=pace_python,
    )
    shown_on = console()
    found = run_shown(run.run, options, shown_on, Unusable)
    report.show(found, shown_on, goals)
    hand_out(
        shown_on,
        found.failures,
        json,
        lambda: report.document(found),
        plot,
        lambda path: roofline.draw(found.rows, path),
        measured=bool(found.rows),
    )


def _require_usable(isa: str) -> None:
    from bmc_core import native

    usable = native.usable_isas() if native.load_error() is None else []
    if isa not in usable:
        raise refuse("--isa", f"{isa}; allowed here: {', '.join(usable)}")
