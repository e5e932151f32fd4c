"""Applies the patches of `patches/` to the installed packages, or to copies of them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "patches"


def package_folder(name: str) -> Path:
    """Where the installed package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def package_of(patch: Path) -> str:
    """The one package that a patch changes."""
    packages = {path.split("/")[0] for path in changed_files(patch)}
    assert len(packages) == 1, f"{patch.name} changes {packages}"
    return packages.pop()


def changed_files(patch: Path) -> list[str]:
    """Files that a patch changes or makes, relative to site-packages."""
    return re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)


def apply(patch: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs `patch -p1` in a folder that holds the package; no fuzz is allowed."""
    command = ["patch", "-p1", "--batch", "--fuzz=0", "--directory", str(folder)]
    command += ["--input", str(patch), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def patched_copy(patch: Path, folder: Path) -> Path:
    """A copy of the package in `folder`, with the patch; unchanged files are links.

    Returns:
        What to put on PYTHONPATH.
    """
    package = package_of(patch)
    origin = package_folder(package)
    copied = {Path(path).parent for path in changed_files(patch)}

    def link(source: str, target: str) -> None:
        # A package's modules must lie where its __init__ is; the files themselves may be links.
        relative = Path(package) / Path(source).relative_to(origin)
        if relative.parent in copied or source.endswith("__init__.py"):
            shutil.copy2(source, target)
        else:
            os.symlink(source, target)

    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(origin, folder / package, copy_function=link, ignore=ignore)
    result = apply(patch, folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def run(script: Path, python_path: list[Path], *arguments: str, **environment: str) -> str:
    """Output of a script in a Python of its own that finds the patched package first."""
    found = os.pathsep.join(map(str, python_path))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        env={**os.environ, **environment, "PYTHONPATH": found},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result.stdout
