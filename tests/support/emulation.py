"""A build of the native module whose kernels run on emulated matrix registers, on any machine.

Promises the shipped bindings, plan, cache writes and items (`csrc/`), compiled anew by the
compiler that Python names; only the registers themselves are the tests' (`tests/native/`). The
operator of `bmc_core.attention` can be run on it as it is. Knows nothing of what is compared.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bmc_core import native

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "bmc_core" / "csrc"
PLAIN = ("plan", "cache_write", "grow_in_place", "tensor_view")
PLAIN += ("sampling_bindings", "sampling_portable")
"""Sources that are compiled for any processor."""
KERNELS = ROOT / "tests" / "native" / "kernels.cpp"
FLAGS = ["-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Without optimization, and without checks that the address sanitizer's cover: they take most of the
# compiler's time.
SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize=null,alignment,object-size"]
SANITIZERS += ["-fno-sanitize-recover=undefined"]
PROBE = '#include <Python.h>\nextern "C" int probe() { return PY_MAJOR_VERSION; }\n'


class UnavailableError(Exception):
    """This machine cannot build or run what was asked for; the message says what is missing."""


class Modules(NamedTuple):
    """Paths of the two builds; the sanitized one is None where the compiler has no sanitizers."""

    plain: Path
    sanitized: Path | None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def _works(flags: list[str], folder: Path) -> bool:
    source = folder / "probe.cpp"
    source.write_text(PROBE)
    include = f"-I{sysconfig.get_path('include')}"
    command = [*_compiler(), *FLAGS, *flags, include, "-shared", str(source)]
    try:
        ran = subprocess.run([*command, "-o", str(folder / "probe.so")], capture_output=True)
    except OSError:
        return False
    return ran.returncode == 0


def _compile(source: Path, to: Path, flags: list[str]) -> None:
    import pybind11

    includes = [CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    options = [*FLAGS, *flags, *(f"-I{path}" for path in includes)]
    subprocess.run([*_compiler(), *options, "-c", str(source), "-o", str(to)], check=True)


def build(folder: Path) -> Modules:
    """Compiles both builds into `folder`.

    Raises:
        UnavailableError: no compiler, no Python headers, or no pybind11 here.
        subprocess.CalledProcessError: the sources do not compile; the compiler has said why.
    """
    if importlib.util.find_spec("pybind11") is None:
        raise UnavailableError("pybind11 is not installed")
    if not _works([], folder):
        raise UnavailableError(
            f"{_compiler()[0]} does not build an extension of Python with OpenMP"
        )
    builds = {"plain": ["-O1"]}
    if _works(SANITIZERS, folder):
        builds["sanitized"] = SANITIZERS
    objects: dict[str, list[Path]] = {name: [] for name in builds}
    jobs: list[tuple[Path, Path, list[str]]] = []
    # The bindings take longest and hold no arithmetic: compiled once, for both.
    sources = [CSRC / "bindings.cpp", KERNELS]
    sources += [CSRC / f"{name}.cpp" for name in PLAIN]
    for source in sources:
        shared = source.stem == "bindings"
        for name, flags in builds.items():
            to = folder / f"{source.stem}.{'shared' if shared else name}.o"
            objects[name].append(to)
            if not shared or name == "plain":
                jobs.append((source, to, ["-O0"] if shared else flags))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in [pool.submit(_compile, *job) for job in jobs]:
            job.result()
    made = {}
    for name, flags in builds.items():
        made[name] = folder / name / "_native.so"
        made[name].parent.mkdir()
        link = [*_compiler(), "-shared", "-fopenmp", *flags, *map(str, objects[name])]
        subprocess.run([*link, "-o", str(made[name])], check=True)
    return Modules(made["plain"], made.get("sanitized"))


@contextmanager
def emulated(path: Path) -> Iterator[None]:
    """Lets `bmc_core.attention` use the module at `path` inside a `with` block."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = native._load
    native._load = lambda: (module, None)
    try:
        yield
    finally:
        native._load = before


def run_sanitized(path: Path, statements: str) -> subprocess.CompletedProcess[str]:
    """Runs Python statements in a process whose memory the sanitizers watch, on that module."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        ask = [*_compiler(), f"-print-file-name={name}"]
        ran = subprocess.run(ask, capture_output=True, text=True, check=True)
        libraries.append(ran.stdout.strip())
    program = (
        "from pathlib import Path\n"
        "from tests.support.emulation import emulated\n"
        f"with emulated(Path({str(path)!r})):\n"
        + "".join(f"    {line}\n" for line in statements.splitlines())
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch leave memory to the end of the process on purpose.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
