"""`python -m bmc_core calibrate`: measures this machine, and shows what it measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bmc_core.cli.options import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    RefreshOption,
    ThreadsOption,
    about,
    calibrated,
    geometry_of_model,
    make_console,
    not_possible_here,
    refuse,
    require_at_least,
    require_writable,
    write_json,
)

if TYPE_CHECKING:
    from bmc_core.costs.calibration import Calibration
    from bmc_core.costs.geometry import Geometry


def command(
    model: ModelOption = None,
    layers: Annotated[int | None, typer.Option(help="Instead of --model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads, with --layers.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads. Default: --heads.")] = None,
    head_size: Annotated[int, typer.Option(help="Elements of a head's row.")] = 64,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    refresh: RefreshOption = False,
    pieces: Annotated[
        bool,
        typer.Option(
            "--pieces",
            help="Also time attention over rows in pieces, as in a paged cache: what r buys "
            "there. About three seconds; not kept.",
        ),
    ] = False,
    json: JsonOption = None,
) -> None:
    """Measures this machine for a model's K and V (about seven seconds) and keeps the figures."""
    require_writable(json, "--json")
    require_at_least(1, layers=layers, heads=heads, kv_heads=kv_heads, head_size=head_size)
    if (model is None) == (layers is None):
        raise typer.BadParameter("--model and --layers: expected one of them")
    if model is not None:
        geometry = geometry_of_model(model, dtype)
    else:
        geometry = _geometry(layers or 1, heads, kv_heads, head_size, dtype or Dtype.bfloat16)
    console = make_console()
    found = calibrated(geometry, threads, refresh, console)
    show_calibration(found, console)
    figures = {
        "geometry": about(geometry, found.threads),
        "file": None if found.path is None else str(found.path),
        "fresh": found.fresh,
        **found.measured._asdict(),
    }
    if pieces:
        figures["pieces"] = _time_pieces(geometry, found.threads, console)
    write_json(figures, json)


def _time_pieces(geometry: Geometry, threads: int, console: Console) -> dict[int, float]:
    """Seconds per row of a layer's decode attention by rows of a piece, shown as a table."""
    from bmc_core.costs.calibration import on_threads
    from bmc_core.costs.pieces import TOLERANCE, piece_seconds, smallest_fast

    try:
        with on_threads(threads):
            seconds = piece_seconds(
                geometry.num_kv_heads,
                geometry.head_size,
                geometry.dtype,
                num_heads=geometry.num_query_heads,
            )
    except (ValueError, TypeError) as error:
        raise refuse("--pieces", f"given, but the kernel takes no such cache: {error}") from None
    except (MemoryError, RuntimeError) as error:
        raise not_possible_here(error, console) from None
    table = Table(box=box.SIMPLE_HEAD, title="Decode attention of one layer over rows in pieces")
    for name in ("rows of a piece", "GB/s", "longer than a stretch"):
        table.add_column(name, justify="right")
    for piece, value in seconds.items():
        rate = geometry.layer_row_bytes / value / 1e9
        longer = f"{value / seconds[0] - 1:.1%}" if piece else ""
        table.add_row(str(piece or "one stretch"), f"{rate:.1f}", longer)
    console.print(table)
    console.print(
        f"the smallest that takes at most {TOLERANCE:.0%} longer: {smallest_fast(seconds)} rows",
        highlight=False,
    )
    return seconds


def _geometry(
    layers: int, heads: int | None, kv_heads: int | None, head_size: int, dtype: Dtype
) -> Geometry:
    import torch

    from bmc_core.costs.geometry import Geometry

    if heads is None:
        raise refuse("--heads", "missing; allowed: the number of query heads")
    try:
        return Geometry(layers, heads, kv_heads or heads, head_size, getattr(torch, dtype.value))
    except ValueError as error:
        raise refuse("--kv-heads", f"{kv_heads}; {error}") from None


def show_calibration(found: Calibration, console: Console) -> None:
    """The figures as tables."""
    from bmc_core.costs.calibration import ATTENTIONS

    console.print(about(found.geometry, found.threads), highlight=False)
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
