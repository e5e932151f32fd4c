"""Make the demo model: a small Llama that writes Python, and a smaller draft for it.

Nothing is downloaded: both are trained here, within `--seconds`, on the sources of the Python
standard library that runs this file, and kept in the user's cache folder:

    <cache>/bmc-llm/demo-<version>/target    Hugging Face directory
    <cache>/bmc-llm/demo-<version>/draft     the same tokenizer, about a third of the work

Promises: the folder appears complete or not at all; two runs at once train once; a folder that
was damaged is made again. A demo model is for demonstrations and tests: it has the shape of
Python and none of its sense.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Raised when what is written changes, so that nobody is served an old model from the cache.
VERSION = 1
DEFAULT_SECONDS = 112.0  # for everything: the promise is two minutes
MODELS = ("target", "draft")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def say(text: str) -> None:
    print(f"demo model: {text}", flush=True)


def default_output() -> Path:
    """The folder in the user's cache that holds this version of the two models."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "bmc-llm" / f"demo-{VERSION}"


def is_complete(folder: Path) -> bool:
    """Whether both models are there and readable (headers and sizes; not every weight)."""
    try:
        for name in MODELS:
            for file in FILES:
                if file.endswith(".json"):
                    json.loads((folder / name / file).read_text(encoding="utf-8"))
            _check_safetensors(folder / name / "model.safetensors")
    except (OSError, ValueError):
        return False
    return True


def _check_safetensors(path: Path) -> None:
    """A safetensors file ends exactly where its header says; a cut one does not."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is cut short")
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if not ends or 8 + length + max(ends) != path.stat().st_size:
        raise ValueError(f"{path} is cut short")


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    output.parent.mkdir(parents=True, exist_ok=True)
    with (output.parent / f"{output.name}.lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is making it: waiting")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def ensure(
    output: Path | None = None, seconds: float = DEFAULT_SECONDS, force: bool = False
) -> Path:
    """The folder with `target` and `draft`, made now if it is not there or is damaged.

    An `output` that exists and is not a demo model is left alone (FileExistsError).
    """
    output = (output or default_output()).expanduser().absolute()
    if not force and is_complete(output):
        return output
    with _locked(output):
        if not force and is_complete(output):  # made while this process waited
            return output
        if output.exists() and not _is_ours(output):
            raise FileExistsError(
                f"{output} exists and does not look like a demo model; it is left as it is"
            )
        scratch = output.with_name(f"{output.name}.unfinished")
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed; we hold the lock
        scratch.mkdir()
        try:
            _make(scratch, seconds)
            if output.exists():
                shutil.rmtree(output)
            scratch.rename(output)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return output


def _is_ours(folder: Path) -> bool:
    """Only what this tool made (or an empty folder) may be removed."""
    return folder.is_dir() and all(entry.name in MODELS for entry in folder.iterdir())


def _make(folder: Path, seconds: float) -> None:
    """Train and save both models into `folder`, in a process of its own.

    Its threads sleep while they wait for each other. The default, to spin, makes a step ten
    times slower where anything else runs on the same cores (measured), and the setting must
    be in the environment before PyTorch is loaded, and not in that of a server started later.
    """
    command = [sys.executable, "-m", "tools.demo.make", str(folder), str(seconds)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if result.returncode:
        raise ChildProcessError(f"the training ended with {result.returncode}; see its message")


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 3600 seconds")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help=f"folder (default: {default_output()})")
    parser.add_argument(
        "--seconds", type=positive, default=DEFAULT_SECONDS,
        help="wall-clock budget for everything (default: %(default).0f)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="make it again although it is there")
    parser.add_argument(
        "--print-path", action="store_true", help="print where it is or would be, and stop"
    )
    arguments = parser.parse_args()
    if arguments.print_path:
        print((arguments.output or default_output()).expanduser().absolute())
        return
    try:
        folder = ensure(arguments.output, arguments.seconds, arguments.force)
    except OSError as error:
        parser.exit(1, f"demo model: error: {error}\n")
    for name in MODELS:
        say(f"{name}: {folder / name}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
