"""`python -m benchmarks`: help, errors, exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as command_line
from benchmarks.kernel import run as kernel
from benchmarks.kernel.operators import Unusable
from benchmarks.kernel.run import Report
from benchmarks.speculation import run as speculation
from benchmarks.step import run as step
from tests.support.kernel_cases import TINY_CASES

COMMANDS = [c.name for c in command_line.app.registered_commands if not c.hidden]
runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


def invoke(*arguments: str) -> tuple[int, str]:
    result = runner.invoke(command_line.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[│╭╮╰╯─\s]+", " ", result.output)


def test_help_names_every_option() -> None:
    code, text = invoke("kernel", "--help")
    assert code == 0
    for option in ("cases", "only", "dtype", "isa", "threads", "pace-python", "json", "plot"):
        assert f"--{option}" in text
    assert "--goals" in text
    code, text = invoke("step", "--help")
    assert code == 0
    for option in ("only", "bind", "rounds", "steps", "compile", "prefill", "goals", "json"):
        assert f"--{option}" in text
    code, text = invoke("speculation", "--help")
    assert code == 0
    for option in ("cases", "only", "bind", "openmp", "rounds", "goals", "json", "plot"):
        assert f"--{option}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernel", "--cases", "all"], ["--cases", "quick", "full"]),
        (["kernel", "--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["kernel", "--isa", "mmx"], ["--isa is mmx", "allowed here", "portable"]),
        (["kernel", "--threads", "100000"], ["--threads is 100000", "allowed: 1 to"]),
        (["kernel", "--threads", "0"], ["--threads is 0", "allowed: 1 to"]),
        (["kernel", "--only", "nothing"], ["--only is 'nothing'", "allowed: part of"]),
        (["kernel", "--json", "/"], ["--json is /", "allowed: the name of a file"]),
        (["kernel", "--plot", "/dev/null/x.png"], ["--plot is /dev/null/x.png", "allowed"]),
        (["step", "--bind", "all"], ["--bind is 'all'", "allowed: CPU numbers"]),
        (["step", "--only", "nothing"], ["--only is 'nothing'", "mha 8x2000"]),
        (["step", "--rounds", "0"], ["--rounds"]),
        (
            ["speculation", "--only", "nothing"],
            ["--only is 'nothing'", "small ngram", "controller"],
        ),
        (["speculation", "--bind", "all"], ["--bind is 'all'", "allowed: CPU numbers"]),
        (["speculation", "--openmp", "libomp"], ["--openmp", "libgomp", "libiomp5"]),
        (["speculation", "--cases", "all"], ["--cases", "quick", "full"]),
        (["speculation", "--plot", "/"], ["--plot is /", "allowed: the name of a file"]),
    ],
)
def test_errors_name_the_option_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr(kernel, "run", None)
    monkeypatch.setattr(step, "run", None)
    monkeypatch.setattr(speculation, "run", None)
    code, text = invoke(*arguments)
    assert code == 2
    for word in words:
        assert word in text


def with_report(monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    monkeypatch.setattr(kernel, "run", lambda options, tell: report)


def test_a_good_run_ends_with_0_and_writes_files(
    monkeypatch: pytest.MonkeyPatch, report: Report, tmp_path: Path
) -> None:
    with_report(monkeypatch, report)
    rows, picture = tmp_path / "rows.json", tmp_path / "roofline.png"
    code, text = invoke("kernel", "--json", str(rows), "--plot", str(picture))
    assert code == 0
    assert rows.exists()
    assert picture.exists()
    for case in TINY_CASES:
        assert case.name in text
    assert "Goals for" not in text, "goals are shown only under --goals"
    assert "Read bandwidth" in text
    code, text = invoke("kernel", "--goals")
    assert code == 0
    assert "Goals for" in text
    assert "not met, the floor here is not told" in text, "products of 128 x 128 tell none"


def test_a_wrong_answer_ends_with_1(monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    with_report(monkeypatch, report._replace(failures=["decode: BMC is wrong"]))
    code, text = invoke("kernel")
    assert code == 1
    assert "BMC is wrong" in text


def test_an_unusable_system_ends_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(options, tell) -> Report:
        raise Unusable("--pace-python x: no package")

    monkeypatch.setattr(kernel, "run", unusable)
    code, text = invoke("kernel")
    assert code == 3
    assert "--pace-python x: no package" in text


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_there_before_torch_is(command: str) -> None:
    """In a process of its own: what one command imports, another must not wait for."""
    arguments = [command] if command else []
    code = (
        "import sys; from benchmarks.__main__ import app\n"
        f"try: app({[*arguments, '--help']})\n"
        "finally: print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    assert "Usage" in found.stdout
