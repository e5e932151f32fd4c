"""What the commands of `python -m bmc_core` have in common: options, errors, how they show work.

Promises that an option's error names the option, its value and what is allowed, and comes before
any work is done, and that importing it does not import torch. Knows no command.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from bmc_core.machine.cpu import num_cores

if TYPE_CHECKING:
    from bmc_core.costs.calibration import Calibration
    from bmc_core.costs.geometry import Geometry


class Dtype(StrEnum):
    """Of K and V."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Attention(StrEnum):
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


def refuse(option: str, text: str) -> typer.BadParameter:
    """The error that names the option, its value and what is allowed."""
    return typer.BadParameter(f"{option} is {text}")


def require_writable(path: Path | None, option: str) -> None:
    """Says before the work, not after it, that a result cannot be written."""
    if path is None:
        return
    if path.is_dir() or str(path) == "-":
        what = "a folder" if path.is_dir() else "not a file's name"
        raise refuse(option, f"{path}, {what}; allowed: the name of a file")
    existed = path.exists()
    with writing(option, path), path.open("a"):
        pass
    if not existed:
        path.unlink()


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Around the writing of a result: a disk that is full is the option's error too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        text = f"{path}, not writable ({error.strerror or error}); allowed: a file that can be"
        raise refuse(option, f"{text} written") from None


def require_at_least(least: int, **options: int | None) -> None:
    """Options by their Python names; None passes."""
    for name, value in options.items():
        if value is not None and value < least:
            option = "--" + name.replace("_", "-")
            raise refuse(option, f"{value}; allowed: an int >= {least}")


def threads_or_cores(threads: int | None) -> int:
    """The option --threads; its default is every core of the affinity mask."""
    cores = num_cores()
    if threads is not None and not 1 <= threads <= cores:
        raise refuse("--threads", f"{threads}; allowed: 1 to {cores}, this process's cores")
    return threads or cores


def geometry_of_model(model: Path, dtype: Dtype | None) -> Geometry:
    """Of the option --model, a folder with a Hugging Face config.json."""
    from bmc_core.costs.geometry import Geometry

    allowed = "allowed: a folder with a Hugging Face config.json"
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refuse("--model", f"{model}, without a config.json; {allowed}") from None
    except (OSError, ValueError) as error:
        raise refuse("--model", f"{model}, not readable ({error}); {allowed}") from None
    try:
        return Geometry.from_config(config, dtype.value if dtype else None)
    except (AttributeError, ValueError) as error:
        raise refuse("--model", f"{model}, {error}; {allowed}") from None


def make_console(width: int = 120) -> Console:
    """As wide as the terminal; `width` columns where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def progress_bar(console: Console) -> ProgressBar:
    """Share done, time taken, and what is done now; gone when it ends."""
    return ProgressBar(
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )


def calibrated(
    geometry: Geometry, threads: int | None, refresh: bool, console: Console
) -> Calibration:
    """`calibrate` under a progress bar; ends with 3 where there is no memory for it."""
    from bmc_core.costs.calibration import calibrate

    count = threads_or_cores(threads)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with progress_bar(console) as bar:
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
            raise not_possible_here(error, console) from None


def not_possible_here(error: Exception, console: Console) -> typer.Exit:
    """Prints what this machine lacks; the exit with 3."""
    console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
    return typer.Exit(3)


def write_json(result: Mapping[str, Any], path: Path | None) -> None:
    """The option --json: writes the file and says where it is."""
    if path is None:
        return
    with writing("--json", path):
        path.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(f"figures: {path}")


def about(geometry: Geometry, threads: int) -> str:
    """What was measured, in one line."""
    dtype = str(geometry.dtype).removeprefix("torch.")
    return (
        f"{geometry.num_layers} layers, {geometry.num_query_heads} query heads, "
        f"{geometry.num_kv_heads} KV heads of {geometry.head_size}, {dtype}: "
        f"{geometry.row_bytes / 1024:.1f} KiB per row; {threads} threads"
    )
