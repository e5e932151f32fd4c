"""Every command line of the pages is one that its program takes: command, options and values.

Nothing is run: typer parses the arguments as it would for a reader, and stops there.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.support import documents

PROGRAM = re.compile(r"(?:^|[\s/])python\S* -m (bmc_core|benchmarks)\b(.*)$")
MAKE = re.compile(r"^make ([a-z][a-z-]*)(?:\s|$)")


def commands() -> list[tuple[Path, str, list[str]]]:
    """Page, program and arguments of each command line; a bare program's name is none."""
    found = []
    for page in documents.PAGES:
        for line in documents.shell_lines(page):
            match = PROGRAM.search(line)
            if match and match[2].strip():
                found.append((page, match[1], shlex.split(match[2])))
    return found


COMMANDS = commands()


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    import benchmarks.__main__
    from bmc_core.cli.app import app

    apps = {"bmc_core": app, "benchmarks": benchmarks.__main__.app}
    return {name: typer.main.get_command(app) for name, app in apps.items()}


def parse(group: Any, arguments: list[str]) -> None:
    """Parses one command's arguments; raises what it would print."""
    name, *rest = arguments
    assert name in group.commands, f"{name}; there are {', '.join(group.commands)}"
    if rest == ["--help"]:
        return
    group.commands[name].make_context(name, rest)


@pytest.mark.parametrize(
    ("page", "program", "arguments"),
    COMMANDS,
    ids=[f"{documents.name_of(p)}: {program} {shlex.join(a)}" for p, program, a in COMMANDS],
)
def test_command_line_is_taken(
    page: Path, program: str, arguments: list[str], programs: dict[str, Any]
) -> None:
    parse(programs[program], arguments)


def test_both_programs_are_documented(programs: dict[str, Any]) -> None:
    documented = {(program, arguments[0]) for _, program, arguments in COMMANDS}
    for program, group in programs.items():
        shown = [name for name, command in group.commands.items() if not command.hidden]
        assert {(program, name) for name in shown} <= documented


def test_a_wrong_option_is_seen(programs: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="--promt"):
        parse(programs["bmc_core"], ["plan", "--model", "DIR", "--promt", "5"])
    with pytest.raises(Exception, match="integer"):
        parse(programs["bmc_core"], ["plan", "--model", "DIR", "--batch", "many"])


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.name_of)
def test_make_has_the_targets(page: Path) -> None:
    makefile = (documents.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    for line in documents.shell_lines(page):
        match = MAKE.match(line)
        assert match is None or match[1] in targets, line
