"""`python -m bmc_core info`: complete, honest, and never an exception."""

import importlib.metadata
import json
import re
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
    assert found["frameworks"]["vllm"].endswith(": takes part (tested: >=0.31,<0.33)")
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
    # These are installed here, and only kept from being imported.
    assert run.stdout.count("cannot be imported: no module named") == 2
    assert "its checks failed" in run.stdout


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


def test_variables_that_matter_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMC_ISA", "avx2")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    monkeypatch.setenv("LD_PRELOAD", "/home/ada/lib/libtcmalloc.so /opt/libiomp5.so")
    for name in ("VLLM_API_KEY", "VLLM_HOST_IP", "HOMEWORK"):
        monkeypatch.setenv(name, "hush")
    found = report()["variables"]
    assert found["BMC_ISA"] == "avx2"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert found["LD_PRELOAD"] == "libtcmalloc.so:libiomp5.so"
    assert "hush" not in as_text(report())
    assert "ada" not in as_text(report())


def run_info_without(*names: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(names=set(names))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_torch_that_does_not_import_is_a_line() -> None:
    run = run_info_without("torch")
    assert run.returncode == 0, run.stderr
    lines = {line.split()[0]: line for line in run.stdout.splitlines() if line.strip()}
    assert "cannot be imported: No module named 'torch'" in lines["torch"]
    assert "CPython" in lines["Python"]
    assert "does not load: No module named 'torch'" in lines["native"]


@pytest.mark.engine
def test_a_framework_with_a_missing_dependency_is_not_missing_itself() -> None:
    run = run_info_without("hjson")
    assert re.search(r"deepspeed +cannot be imported: no module named hjson", run.stdout)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("VLLM_PLUGINS", "foo"), ("VLLM_PLUGINS", ""), ("VLLM_TARGET_DEVICE", "cpu")],
)
def test_a_plugin_that_vllm_does_not_ask(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    text = report()["frameworks"]["vllm"]
    assert f"steps aside: {variable}={value}: vLLM loads" in text
