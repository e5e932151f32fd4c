"""Who may know whom: lib no command and no engine, engines only lib, a command no other command."""

import ast
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(benchmarks.__file__).parent
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
COMMANDS = {path.parent.name for path in ROOT.glob("*/command.py")} - {"lib"}


def rooms_known_by(file: Path) -> set[str]:
    """Folders of `benchmarks` that a file imports from, anywhere in it."""
    known = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        known |= {name.split(".")[1] for name in names if name.startswith("benchmarks.")}
    return known


def test_there_are_commands() -> None:
    assert {"kernel", "step", "generate", "growth", "overhead"} <= COMMANDS
    assert COMMANDS | {"lib", "engines"} == FOLDERS


@pytest.mark.parametrize("room", sorted(FOLDERS))
def test_a_room_knows_only_those_below(room: str) -> None:
    below = {"lib"} | ({"engines", room} if room != "lib" else set())
    for file in sorted((ROOT / room).rglob("*.py")):
        assert rooms_known_by(file) <= below, file


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_has_the_one_shape(command: str) -> None:
    files = {path.name for path in (ROOT / command).glob("*.py")}
    assert {"__init__.py", "command.py", "run.py", "report.py"} <= files
    assert f"`python -m benchmarks {command}`" in (ROOT / command / "__init__.py").read_text()
    assert f"\n    {command} " in (benchmarks.__doc__ or "")


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*_worker.py")), ids=lambda file: file.name)
def test_a_peers_worker_knows_nothing_of_this_project(file: Path) -> None:
    """vLLM's is the exception: it runs in this project's own environment."""
    assert rooms_known_by(file) <= ({"lib"} if file.name == "vllm_worker.py" else set())
