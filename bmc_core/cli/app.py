"""Registers the commands of `python -m bmc_core`."""

from __future__ import annotations

import typer

from bmc_core.cli import calibrate, info, plan

app = typer.Typer(
    help="How many rows a KV cache should grow by on this machine: measured costs, and the model "
    "that makes r and T of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("calibrate")(calibrate.command)
app.command("plan")(plan.command)
app.command("info")(info.command)
