"""`python -m bmc_core info`: complete, honest, and never an exception."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bmc_core import environment, native
from bmc_core.cli.app import app
from bmc_core.environment import Framework, as_text, report

SECTIONS = ["versions", "machine", "frameworks", "kernels", "variables"]
WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["bmc_core", "info"]
import runpy
runpy.run_module("bmc_core", run_name="__main__")
"""


def test_everything_that_a_bug_report_needs() -> None:
    found = report()
    assert list(found) == SECTIONS
    assert found["versions"]["torch"].startswith("2.")
    assert found["kernels"]["instruction set"].split()[0] == native.isa()
    assert "libgomp" in found["kernels"]["OpenMP runtimes"]
    assert found["machine"]["processor"]
    assert found["frameworks"]["vllm"].endswith(": takes part (tested: >=0.32,<0.33)")
    assert "takes part" in found["frameworks"]["deepspeed"]
    assert "takes part" in found["frameworks"]["transformers"]


def test_without_any_framework_and_without_the_command_lines_packages() -> None:
    names = {"vllm", "transformers", "deepspeed", "typer", "rich", "matplotlib"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for section in SECTIONS:
        assert f"\n{section}\n" in "\n" + run.stdout
    assert "transformers" in run.stdout
    assert run.stdout.count("not installed: no module named") == 3
    assert "error" not in run.stdout


def test_the_command_writes_the_same_as_json(tmp_path: Path) -> None:
    file = tmp_path / "info.json"
    result = CliRunner().invoke(app, ["info", "--json", str(file)])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert list(written) == SECTIONS
    assert written["versions"]["torch"] in result.output


def test_a_section_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise PermissionError("not for you")

    monkeypatch.setattr(environment, "_machine", broken)
    found = report()
    assert found["machine"] == {"error": "PermissionError: not for you"}
    assert found["kernels"]["native module"] == "loaded"


def test_a_framework_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("broken", "tests.core.test_environment:no_such", "group"),
        importlib.metadata.EntryPoint("good", "tests.core.test_environment:good", "group"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    found = report()["frameworks"]
    assert found["broken"].startswith("AttributeError: ")
    assert found["good"] == "1.0: steps aside: it is too old"


def good() -> Framework:
    return Framework("1.0", ">=2", "it is too old")


def test_what_a_framework_says() -> None:
    assert str(Framework(None, ">=2")) == "not installed (tested: >=2)"
    assert str(Framework("2.1", ">=2")) == "2.1: takes part (tested: >=2)"


def test_a_missing_native_module_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_error", lambda: "bmc_core's native module does not load")
    assert report()["kernels"]["native module"] == "bmc_core's native module does not load"


def test_variables_that_matter_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMC_ISA", "avx2")
    monkeypatch.setenv("VLLM_API_KEY", "hush")
    monkeypatch.setenv("HOMEWORK", "no")
    found = report()["variables"]
    assert found["BMC_ISA"] == "avx2"
    assert found["VLLM_API_KEY"] == "set, not shown"
    assert "HOMEWORK" not in found
    assert "hush" not in as_text(report())
