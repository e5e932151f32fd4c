"""How a command ends: its exit codes, and what is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console

from benchmarks import __main__ as command_line
from benchmarks.kernel import run as kernel
from benchmarks.lib.command import hand_out, run_shown


class UnableError(Exception):
    pass


def raising(error: Exception) -> Callable[..., None]:
    def run(options: object, tell: object) -> None:
        raise error

    return run


def too_large(options: object, tell: object) -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (raising(UnableError("no package")), "no package"),
        (raising(OSError(28, "No space left on device")), "No space left"),
        (raising(MemoryError()), "MemoryError"),
        (too_large, "memory"),
    ],
)
def test_what_cannot_run_here_ends_with_3(run: Callable[..., None], said: str) -> None:
    console = Console(width=200)
    with console.capture() as shown, pytest.raises(typer.Exit) as ended:
        run_shown(run, None, console, UnableError)
    assert ended.value.exit_code == 3
    assert said in shown.get()


def test_what_nobody_expects_is_neither_wrong_nor_unable() -> None:
    with pytest.raises(KeyError):
        run_shown(raising(KeyError("x")), None, Console(), UnableError)


def test_a_mistake_of_the_benchmark_ends_with_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel, "run", raising(KeyError("x")))
    monkeypatch.setattr("sys.argv", ["benchmarks", "kernel"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 4
    assert "KeyError: 'x'" in capsys.readouterr().err


def test_nothing_measured_ends_with_3_after_the_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for failures, measured, code in (([], False, 3), (["wrong"], False, 1), (["wrong"], True, 1)):
        with pytest.raises(typer.Exit) as ended:
            hand_out(Console(), failures, path, lambda: {"rows": []}, measured=measured)
        assert ended.value.exit_code == code
        assert path.exists()
        path.unlink()
    hand_out(Console(), [], path, lambda: {"rows": []})


def test_a_result_that_cannot_be_written_is_the_options_error() -> None:
    """A disk that is full says so only when it is written to."""
    with pytest.raises(typer.BadParameter, match="--json is /dev/full, not writable"):
        hand_out(Console(), [], Path("/dev/full"), lambda: {"rows": [1]})
    with pytest.raises(typer.BadParameter, match="--plot is /dev/full, not writable"):
        hand_out(
            Console(), [], None, dict, Path("/dev/full"), lambda path: path.write_text("picture")
        )
