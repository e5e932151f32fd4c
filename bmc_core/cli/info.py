"""`python -m bmc_core info`: what a bug report needs."""

from __future__ import annotations

import typer

from bmc_core.cli.options import JsonOption, require_writable, write_json
from bmc_core.environment import as_text, report


def command(json: JsonOption = None) -> None:
    """Versions, machine, instruction sets, OpenMP, memory, where BMC takes part."""
    require_writable(json, "--json")
    found = report()
    typer.echo(as_text(found))
    write_json(found, json)
