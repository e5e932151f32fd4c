"""The commands `calibrate` and `plan` of `python -m bmc_core`."""

from __future__ import annotations

import json
import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bmc_core.__main__ import EXTRA
from bmc_core.calibration import ATTENTIONS, Calibration, calibrate
from bmc_core.calibration_measure import why_not_native
from bmc_core.geometry import Geometry
from bmc_core.spectrum import Spectrum, document, spectrum

app = typer.Typer(
    help="How many rows a KV cache should grow by on this machine: measured costs, and the model "
    "that makes r and T of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    """Of K and V."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Path_(StrEnum):  # noqa: N801 - not pathlib's
    """How a step attends."""

    native = "native"
    sdpa = "sdpa"
    padded = "padded"


ModelOption = Annotated[
    Path | None,
    typer.Option("--model", metavar="DIR", help="A Hugging Face model's folder: its config.json."),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="torch's threads. Default: the cores of the affinity mask.")
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of K and V. Default: the model's.")]
RefreshOption = Annotated[
    bool, typer.Option("--refresh", help="Measure again although there are figures.")
]
JsonOption = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Write the figures to this file.")
]


def _refuse(option: str, text: str) -> typer.BadParameter:
    return typer.BadParameter(f"{option} is {text}")


def _writable(path: Path | None, option: str) -> None:
    if path is None:
        return
    if path.is_dir():
        raise _refuse(option, f"{path}, a folder; allowed: the name of a file")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise _refuse(option, f"{path}, not writable; allowed: a file in a writable folder")


def _at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            option = "--" + name.replace("_", "-")
            raise _refuse(option, f"{value}; allowed: an int >= {least}")


def _of_model(model: Path, dtype: Dtype | None) -> Geometry:
    allowed = "allowed: a folder with a Hugging Face config.json"
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refuse("--model", f"{model}, without a config.json; {allowed}") from None
    except (OSError, ValueError) as error:
        raise _refuse("--model", f"{model}, not readable ({error}); {allowed}") from None
    try:
        return Geometry.from_config(config, dtype.value if dtype else None)
    except (AttributeError, ValueError) as error:
        raise _refuse("--model", f"{model}, {error}; {allowed}") from None


def _threads(threads: int | None) -> int:
    cores = len(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= cores:
        raise _refuse("--threads", f"{threads}; allowed: 1 to {cores}, this process's cores")
    return threads or cores


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _calibrated(geometry: Geometry, threads: int | None, refresh: bool, console: Console):
    count = _threads(threads)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    bar = Progress(
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=1.0)
        try:
            return calibrate(
                geometry,
                threads=count,
                refresh=refresh,
                progress=lambda text, done: bar.update(task, description=text, completed=done),
            )
        except (MemoryError, RuntimeError) as error:
            bar.stop()
            console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
            raise typer.Exit(3) from None


def _write(result: dict[str, Any], path: Path | None, console: Console) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"figures: {path}", highlight=False, markup=False)


def _about(geometry: Geometry, threads: int) -> str:
    dtype = str(geometry.dtype).removeprefix("torch.")
    return (
        f"{geometry.num_layers} layers, {geometry.num_query_heads} query heads, "
        f"{geometry.num_kv_heads} KV heads of {geometry.head_size}, {dtype}: "
        f"{geometry.row_bytes / 1024:.1f} KiB per row; {threads} threads"
    )


@app.command("calibrate")
def calibrate_command(
    model: ModelOption = None,
    layers: Annotated[int | None, typer.Option(help="Instead of --model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads, with --layers.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads. Default: --heads.")] = None,
    head_size: Annotated[int, typer.Option(help="Elements of a head's row.")] = 64,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    refresh: RefreshOption = False,
    json: JsonOption = None,
) -> None:
    """Measures this machine for a model's K and V (about seven seconds) and keeps the figures."""
    _writable(json, "--json")
    _at_least(1, layers=layers, heads=heads, kv_heads=kv_heads, head_size=head_size)
    if (model is None) == (layers is None):
        raise typer.BadParameter("--model and --layers: expected one of them")
    if model is not None:
        geometry = _of_model(model, dtype)
    else:
        if heads is None:
            raise _refuse("--heads", "missing; allowed: the number of query heads")
        kind = getattr(torch, (dtype or Dtype.bfloat16).value)
        try:
            geometry = Geometry(layers or 1, heads, kv_heads or heads, head_size, kind)
        except ValueError as error:
            raise _refuse("--kv-heads", f"{kv_heads}; {error}") from None
    console = _console()
    found = _calibrated(geometry, threads, refresh, console)
    show_calibration(found, console)
    _write(
        {
            "geometry": _about(geometry, found.threads),
            "file": None if found.path is None else str(found.path),
            "fresh": found.fresh,
            **found.measured._asdict(),
        },
        json,
        console,
    )


def show_calibration(found: Calibration, console: Console) -> None:
    """The figures as tables."""
    console.print(_about(found.geometry, found.threads), highlight=False)
    where = "not kept: no writable cache folder" if found.path is None else str(found.path)
    console.print(f"{'measured now' if found.fresh else 'kept'}, {where}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title="Growth of one layer: allocate, copy, release")
    for name in ("layout", "K and V copied, MiB", "ms", "GB/s"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    curves = {"rows": found.measured.growth_rows, "packed": found.measured.growth_packed or ()}
    for layout, points in curves.items():
        for size, seconds in points:
            rate = size / seconds / 1e9
            table.add_row(layout, f"{size / 2**20:.1f}", f"{seconds * 1e3:.3f}", f"{rate:.1f}")
        table.add_section()
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, title="Attention of one query row, all layers, one sequence")
    for name in ("path", "K and V", "valid row, us (c_read)", "GB/s", "spare row, us (c_row)"):
        table.add_column(name, justify="left" if name in ("path", "K and V") else "right")
    per_row = found.geometry.row_bytes * 1e6
    for name in ATTENTIONS:
        for amount, cost in zip(("few", "many"), getattr(found.measured, name) or (), strict=False):
            figures = (cost.valid * per_row, 1e-9 / cost.valid, cost.padding * per_row)
            table.add_row(name, amount, *(f"{figure:.3g}" for figure in figures))
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, title="Linear layers of a step")
    table.add_column("rows of the batch")
    table.add_column("ms", justify="right")
    for rows, seconds in found.measured.steps:
        table.add_row(str(rows), f"{seconds * 1e3:.2f}")
    console.print(table)


@app.command("plan")
def plan_command(
    model: ModelOption = None,
    prompt: Annotated[int, typer.Option(help="P, rows of the prompt.")] = 512,
    new: Annotated[int, typer.Option(help="N, rows after it.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences, beams included.")] = 1,
    attention: Annotated[
        Path_ | None,
        typer.Option(
            help="The path that is priced: the native kernel, torch's sdpa over valid rows, or "
            "sdpa over every row that is held. Default: native where it can be used, else sdpa."
        ),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(help="k: a step verifies k + 1 rows.")] = 0,
    acceptance: Annotated[float, typer.Option(help="Chance that a draft token is accepted.")] = 0.0,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    refresh: RefreshOption = False,
    json: JsonOption = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw cost against r. Needs matplotlib.")
    ] = None,
) -> None:
    """r, T, predicted seconds and memory in reserve, from a growth per token to all up front."""
    _writable(json, "--json")
    _writable(plot, "--plot")
    _at_least(0, prompt=prompt, draft_tokens=draft_tokens)
    _at_least(1, new=new, batch=batch)
    if not 0.0 <= acceptance <= 1.0:
        raise _refuse("--acceptance", f"{acceptance}; allowed: 0 to 1")
    if plot is not None:
        _require_matplotlib()
    if model is None:
        raise _refuse("--model", "missing; allowed: a folder with a Hugging Face config.json")
    geometry = _of_model(model, dtype)
    reason = why_not_native(geometry)
    if attention is None:
        attention = Path_.sdpa if reason else Path_.native
    elif attention is Path_.native and reason:
        raise _refuse("--attention", f"native, but {reason}; allowed: sdpa, padded")
    console = _console()
    found = _calibrated(geometry, threads, refresh, console)

    def priced(finely: bool) -> Spectrum:
        return spectrum(
            found,
            attention.value,  # type: ignore[arg-type]
            prompt_rows=prompt,
            new_rows=new,
            batch_size=batch,
            draft_tokens=draft_tokens,
            acceptance=acceptance,
            finely=finely,
        )

    plan = priced(False)
    show_plan(plan, found, console)
    _write(document(plan, found), json, console)
    if plot is not None:
        from bmc_core.plot import draw

        draw(
            priced(True), plot, f"{model.name}: P = {prompt}, N = {new}, batch {batch}, {attention}"
        )
        console.print(f"picture: {plot}", highlight=False, markup=False)


def _require_matplotlib() -> None:
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise typer.BadParameter(f"--plot needs matplotlib: {EXTRA}") from None


def show_plan(plan: Spectrum, found: Calibration, console: Console) -> None:
    """The choice, and the table of the spectrum."""
    work, chosen = plan.work, plan.chosen
    console.print(_about(found.geometry, found.threads), highlight=False)
    console.print(
        f"P = {work.prompt_rows}, N = {work.new_rows}, batch {work.batch_size}, attention "
        f"{plan.attention}: [bold]r = {chosen.r}, T = {chosen.prediction.growths}[/] growths, "
        f"{chosen.prediction.seconds:.3g} s",
        highlight=False,
    )
    if plan.costs.c_row > 0.0:
        console.print(f"closed form: T* = {plan.best_growths:.1f}", highlight=False)
    else:
        console.print(
            "This path skips spare rows: the smallest reserve within 2 % of the cache's best time.",
            highlight=False,
        )
    if work.acceptance > 0.0:
        console.print(
            f"at acceptance {work.acceptance:g}, {plan.draft_tokens} draft tokens per step give "
            "the most rows per second (drafting itself not counted)",
            highlight=False,
        )
    table = Table(box=box.SIMPLE_HEAD, caption="seconds are predicted; other: linear layers, calls")
    names = ("r", "T", "growths s", "padding s", "reading s", "other s", "total s")
    for name in (*names, "reserve MiB", "most MiB", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in plan.choices:
        result = choice.prediction
        parts = (result.copy_seconds, result.padding_seconds, result.read_seconds)
        mark = "<- chosen" if choice.chosen else "up front" if choice is plan.choices[-1] else ""
        table.add_row(
            *(str(choice.r), str(result.growths)),
            *(f"{value:.3f}" for value in (*parts, result.step_seconds, result.seconds)),
            *(f"{b / 2**20:.1f}" for b in (choice.reserve_bytes, choice.most_reserve_bytes)),
            mark,
            style="bold" if choice.chosen else None,
        )
    console.print(table)
