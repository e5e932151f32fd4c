"""`python -m bmc_core plan`: the r that the model chooses, beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bmc_core.cli.extra import EXTRA
from bmc_core.cli.options import (
    Attention,
    DtypeOption,
    JsonOption,
    ModelOption,
    RefreshOption,
    ThreadsOption,
    about,
    calibrated,
    geometry_of_model,
    make_console,
    refuse,
    require_at_least,
    require_writable,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from bmc_core.costs.calibration import Calibration
    from bmc_core.costs.spectrum import Spectrum

MAX_ROWS = 1_000_000
"""Of a prompt and of new rows: the spectrum walks every growth, down to one for each new row."""


def command(
    model: ModelOption = None,
    prompt: Annotated[int, typer.Option(help="P, rows of the prompt.")] = 512,
    new: Annotated[int, typer.Option(help="N, rows after it.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences, beams included.")] = 1,
    attention: Annotated[
        Attention | None,
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
    from bmc_core.costs.measure import why_not_native
    from bmc_core.costs.spectrum import document, spectrum

    require_writable(json, "--json")
    require_writable(plot, "--plot")
    require_at_least(0, prompt=prompt, draft_tokens=draft_tokens)
    require_at_least(1, new=new, batch=batch)
    for option, rows in (("--prompt", prompt), ("--new", new)):
        if rows > MAX_ROWS:
            raise refuse(option, f"{rows}; allowed: at most {MAX_ROWS} rows")
    if not 0.0 <= acceptance <= 1.0:
        raise refuse("--acceptance", f"{acceptance}; allowed: 0 to 1")
    if plot is not None:
        _require_matplotlib()
    if model is None:
        raise refuse("--model", "missing; allowed: a folder with a Hugging Face config.json")
    geometry = geometry_of_model(model, dtype)
    reason = why_not_native(geometry)
    if attention is None:
        attention = Attention.sdpa if reason else Attention.native
    elif attention is Attention.native and reason:
        raise refuse("--attention", f"native, but {reason}; allowed: sdpa, padded")
    console = make_console()
    found = calibrated(geometry, threads, refresh, console)

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
    write_json(document(plan, found), json)
    if plot is not None:
        from bmc_core.cli.plot import draw

        title = f"{model.name}: P = {prompt}, N = {new}, batch {batch}, {attention}"
        with writing("--plot", plot):
            draw(priced(True), plot, title)
        console.print(f"picture: {plot}", highlight=False, markup=False)


def _require_matplotlib() -> None:
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise typer.BadParameter(f"--plot needs matplotlib: {EXTRA}") from None


def show_plan(plan: Spectrum, found: Calibration, console: Console) -> None:
    """The choice, and the table of the spectrum."""
    work, chosen = plan.work, plan.chosen
    console.print(about(found.geometry, found.threads), highlight=False)
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
