"""The command line: `python -m benchmarks kernel`, `step`, `generate` and `model`."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_Options = TypeVar("_Options")
_Report = TypeVar("_Report")
_Tell = Callable[[str, float], None]

app = typer.Typer(
    help="BMC beside its peers on this machine. Every number is measured, and every answer "
    "checked, in the run that prints it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Cases(StrEnum):
    """Which list of cases."""

    quick = "quick"
    full = "full"


class Dtype(StrEnum):
    """Of query, K and V."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )


def _run_shown(
    run: Callable[[_Options, _Tell], _Report],
    options: _Options,
    console: Console,
    *unable: type[Exception],
) -> _Report:
    """A run under a progress bar; ends with 3 where it raises one of `unable`."""
    with _progress(console) as progress:
        task = progress.add_task("starting", total=1.0)
        try:
            return run(
                options, lambda text, done: progress.update(task, description=text, completed=done)
            )
        except unable as error:
            progress.stop()
            console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
            raise typer.Exit(3) from None


def _refuse(option: str, text: str) -> typer.BadParameter:
    """The error that names the option, its value and what is allowed."""
    return typer.BadParameter(f"{option} is {text}")


def _writable(path: Path | None, option: str) -> None:
    """Says before the run, not after it, that a result cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise _refuse(option, f"{path}, a folder; allowed: the name of a file")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise _refuse(option, f"{path}, not writable; allowed: a file in a writable folder")


@app.command()
def kernel(
    cases: Annotated[
        Cases, typer.Option(help="The goal table (within two minutes), or more shapes and groups.")
    ] = Cases.quick,
    only: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Only cases whose name contains a match."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Every case in this dtype; default: each in its own.")
    ] = None,
    isa: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Instruction set of BMC and of CPU_ATTN: amx_bf16, avx512_bf16, avx512, avx2 or "
            "portable (CPU_ATTN: avx2). Default: the best of each.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of every system. Default: the cores of the affinity mask."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Timed seconds per case, all systems together. Default: 1.2 quick, 6 full.",
        ),
    ] = None,
    pace_python: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Python of an environment with AMD's pace-vllm: its SlabPool is timed too.",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write the rows to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the roofline picture.")
    ] = None,
) -> None:
    """Attention of one layer: BMC, vLLM's CPU_ATTN and torch's sdpa, alternating call by call.

    Each system walks over rotating sets larger than four L3 caches, after this machine's read
    bandwidth and GEMM rate were measured. Ends with 1 when an answer was wrong, 2 when an option
    is not allowed, 3 when a system cannot run here.
    """
    from benchmarks.kernel import report as reports
    from benchmarks.kernel import roofline as pictures
    from benchmarks.kernel.cases import select, with_goals_of
    from benchmarks.kernel.operators import Unusable
    from benchmarks.kernel.run import Options, run

    _writable(json, "--json")
    _writable(plot, "--plot")
    if threads is not None and not 1 <= threads <= _cores():
        raise _refuse("--threads", f"{threads}; allowed: 1 to {_cores()}, this process's cores")
    if isa is not None:
        from bmc_core import native

        usable = native.usable_isas() if native.load_error() is None else []
        if isa not in usable:
            raise _refuse("--isa", f"{isa}; allowed here: {', '.join(usable)}")
    count = threads or _cores()
    try:
        chosen = select(
            cases.value,
            count,
            only,
            dtype.value if dtype else None,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console = _console()
    if isa is not None:
        chosen = with_goals_of(chosen, isa)
    options = Options(
        cases=chosen,
        threads=count,
        seconds=seconds if seconds is not None else (1.2 if cases is Cases.quick else 6.0),
        isa=isa,
        pace_python=pace_python,
    )
    report = _run_shown(run, options, console, Unusable)
    reports.show_kernel(report, console)
    if json is not None:
        reports.write_json(reports.kernel_document(report), json)
        console.print(f"rows: {json}", highlight=False, markup=False)
    if plot is not None:
        try:
            pictures.roofline(report.rows, plot)
        except ValueError as error:
            console.print(str(error), markup=False)
        else:
            console.print(f"picture: {plot}", highlight=False, markup=False)
    if report.failures:
        raise typer.Exit(1)


@app.command()
def step(
    only: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Only cases whose name contains a match."),
    ] = None,
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
    json: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write the rows to this file.")
    ] = None,
) -> None:
    """A whole decode step of vLLM: BMC against CPU_ATTN, two engines alive, stepped in turns.

    Ends with 1 when the answers differ or are not finite, 2 when an option is not allowed, 3
    when an engine cannot run here.
    """
    import re

    from benchmarks.kernel.report import now, write_json
    from benchmarks.lib.worker_client import WorkerError
    from benchmarks.step import run as steps_of
    from benchmarks.step.cases import select

    _writable(json, "--json")
    if bind is not None and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", bind):
        raise _refuse("--bind", f"{bind!r}; allowed: CPU numbers and ranges, as 0-3,8")
    try:
        chosen = select(only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    options = steps_of.Options(
        chosen, bind or steps_of.default_bind(), rounds, steps, compile_model, not prefill
    )
    console = _console()
    report = _run_shown(steps_of.run, options, console, WorkerError, MemoryError)
    steps_of.show_step(report, console)
    if json is not None:
        write_json(steps_of.step_document(report, now()), json)
        console.print(f"rows: {json}", highlight=False, markup=False)
    if report.failures:
        raise typer.Exit(1)


@app.command()
def generate(
    cases: Annotated[
        Cases,
        typer.Option(
            help="Three cases (three minutes), or the grid of twelve that averages are of."
        ),
    ] = Cases.quick,
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
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of every system. Default: the affinity mask's cores."),
    ] = None,
    llama_cpp_python: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Python of an environment with llama-cpp-python and gguf: llama.cpp is timed too.",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write the rows to this file.")
    ] = None,
) -> None:
    """A decode step of Hugging Face generation: BMC, transformers' caches and DeepSpeed in turns.

    Ends with 1 when an answer differs, 2 when an option is not allowed, 3 when a system cannot run
    here.
    """
    from benchmarks.engines.transformers import NAMES
    from benchmarks.generate import run as steps_of
    from benchmarks.generate.report import generate_document, show_generate
    from benchmarks.kernel.report import now, write_json
    from benchmarks.lib.worker_client import WorkerError

    _writable(json, "--json")
    names = NAMES if systems is None else tuple(systems.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise _refuse("--systems", f"{', '.join(unknown)}; allowed: {', '.join(NAMES)}")
    if (batch is None) != (rows is None):
        raise _refuse("--batch and --rows", "one without the other; allowed: both or none")
    chosen = steps_of.FULL if cases is Cases.full else steps_of.QUICK
    if batch is not None and rows is not None:
        chosen = (steps_of.GenerateCase(batch, rows),)
    options = steps_of.Options(
        chosen, threads or _cores(), names, r, rounds, llama_cpp_python=llama_cpp_python
    )
    console = _console()
    report = _run_shown(steps_of.run, options, console, WorkerError)
    show_generate(report, console)
    if json is not None:
        write_json(generate_document(report, now()), json)
        console.print(f"rows: {json}", highlight=False, markup=False)
    if report.failures:
        raise typer.Exit(1)


@app.command()
def model(
    cases: Annotated[
        Cases,
        typer.Option(help="N up to 512 after a short prompt, or up to 1024 and a longer one too."),
    ] = Cases.quick,
    path: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="How steps attend: padded (sdpa over every row that is held), sdpa (over views of "
            "the valid rows) or native. May be given again. Default: all three.",
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            metavar="ROWS",
            help="P, rows of the prompt. May be given again. Default: 16, and 256 with full.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="torch's threads. Default: the cores of the affinity mask."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every generation is run.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    json: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write the curves to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw predicted against measured.")
    ] = None,
) -> None:
    """The analytical model: r swept over real generations of transformers, against its prediction.

    Ends with 1 when tokens are wrong, 2 when an option is not allowed, 3 when it cannot run here.
    """
    _writable(json, "--json")
    _writable(plot, "--plot")
    if threads is not None and not 1 <= threads <= _cores():
        raise _refuse("--threads", f"{threads}; allowed: 1 to {_cores()}, this process's cores")
    console = _console()
    try:
        from benchmarks.growth import report as reports
        from benchmarks.growth import run as models
    except ImportError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        raise typer.Exit(3) from None
    from benchmarks.kernel.report import now, write_json

    for name in path or ():
        if name not in models.PATHS:
            raise _refuse("--path", f"{name}; allowed: {', '.join(models.PATHS)}")
    for rows in prompt or ():
        if rows < 1:
            raise _refuse("--prompt", f"{rows}; allowed: at least 1 row")
    full = cases is Cases.full
    options = models.Options(
        lengths=(128, 256, 512, 1024) if full else (128, 256, 512),
        prompts=tuple(dict.fromkeys(prompt)) if prompt else (16, 256) if full else (16,),
        threads=threads or _cores(),
        rounds=rounds,
        batch_size=batch,
        paths=tuple(dict.fromkeys(path)) if path else models.PATHS,
    )
    report = _run_shown(models.run, options, console, MemoryError, RuntimeError)
    reports.show_model(report, console)
    if json is not None:
        write_json(reports.model_document(report, now()), json)
        console.print(f"curves: {json}", highlight=False, markup=False)
    if plot is not None:
        reports.draw_model(report, plot)
        console.print(f"picture: {plot}", highlight=False, markup=False)
    if report.failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
