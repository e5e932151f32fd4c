"""The wheel, built from the source archive with build isolation, works away from the checkout, and
both say what they are and under which license."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import torch
from bmc_core import native
from bmc_core.attention import AttentionBatch, paged_attention, write_kv
cache = torch.zeros(2, 1, 16, 64)
row = torch.ones(1, 1, 32)
write_kv(row, 3 * row, cache, torch.tensor([16]))
out = torch.empty(1, 1, 32)
batch = AttentionBatch(*(torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [1], [[1]])), 16)
paged_attention(row, cache, batch, out, scale=1.0)
import sys, bmc_core
frameworks = {"vllm", "transformers", "deepspeed"} & set(sys.modules)
print(native.isa(), bool((out == 3).all()), sorted(frameworks), bmc_core.__file__)
"""


def run(*command: str, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def check_license(wheel: Path, source: Path) -> None:
    """The license by its SPDX name alone, and its whole text in both archives."""
    metadata = metadata_of(wheel)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    classifiers = metadata.get_all("Classifier") or []
    assert classifiers
    # Package indexes refuse a license classifier beside an expression.
    assert not [name for name in classifiers if name.startswith("License")]
    text = (ROOT / "LICENSE").read_bytes()
    assert text.strip().startswith(b"Apache License")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
        assert archive.read(name) == text
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    documents = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert {"LICENSE", "README.md", "CHANGELOG.md", *documents} <= names


@pytest.mark.build
def test_wheel_builds_and_runs_elsewhere(tmp_path: Path) -> None:
    # Without --wheel: the wheel is built from the source archive, so that must be complete too.
    run(sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT), cwd=ROOT)
    (wheel,) = tmp_path.glob("bmc_llm-*.whl")
    (source,) = tmp_path.glob("bmc_llm-*.tar.gz")
    check_license(wheel, source)
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("bmc_core/_native.") and name.endswith(".so") for name in names)
    packages = ("bmc_core", "bmc_deepspeed", "bmc_transformers", "bmc_vllm")
    modules = {str(p.relative_to(ROOT)) for name in packages for p in (ROOT / name).rglob("*.py*")}
    modules = {name for name in modules if name.endswith((".py", ".pyi"))}
    assert modules <= set(names), "a package is missing in pyproject.toml"
    assert {f"{name}/py.typed" for name in packages} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "tools", "benchmarks"))]
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "[vllm.platform_plugins]\nbmc = bmc_vllm.plugin:register" in text

    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    script = f"import sys; sys.path.insert(0, {str(target)!r})\n{SCRIPT}"
    isa, right, frameworks, where = run(sys.executable, "-c", script, cwd=tmp_path).split(" ", 3)
    assert isa
    assert right == "True"
    assert frameworks == "[]"
    assert where.startswith(str(target))
