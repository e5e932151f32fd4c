"""Runs a script in two processes with DeepSpeed's own launcher, and leaves nothing behind.

The processes talk over 127.0.0.1 at a free port. DeepSpeed compiles its shared-memory operator when
it is first used (about a minute): it is built once, into a folder of the user's cache that is named
after the versions it was built for.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD_OPERATOR = (
    "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Builder; Builder().load()"
)


def extensions_folder() -> Path:
    """Where torch keeps the compiled operator for this Python, torch and DeepSpeed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = "".join(map(str, sys.version_info[:2]))
    name = f"py{python}-torch{torch.__version__}-deepspeed{deepspeed.__version__}"
    return cache / "bmc-llm" / "torch_extensions" / name


def environment(port: int) -> dict[str, str]:
    """What the launcher and its processes see."""
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(extensions_folder()),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(command: list[str], port: int, timeout: float) -> str:
    """Output of a command; it and all that it started are gone afterwards, whatever happens."""
    with subprocess.Popen(
        command,
        env=environment(port),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            # Also after success: a rank may outlive its launcher.
            _kill_group(process.pid)
    assert process.returncode == 0, f"{command} ended with {process.returncode}:\n{output[-6000:]}"
    return output


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def build_operator(timeout: float = 300) -> None:
    """Compiles the shared-memory operator unless it is there."""
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # Tests run in several processes: one builds, the others wait.
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*/deepspeed_shm_comm*.so")):
            # What an interrupted build has left, its own lock above all, would block the next one
            # for ever.
            shutil.rmtree(folder)
            folder.mkdir()
        run([sys.executable, "-c", BUILD_OPERATOR], free_port(), timeout)


def shared_buffers(port: int) -> list[Path]:
    """Files that DeepSpeed has left in shared memory for a run at this port."""
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_"
    return sorted(Path("/dev/shm").glob(f"{prefix}*"))


def launch(script: Path, folder: Path, *arguments: str, timeout: float = 240) -> list[Any]:
    """Runs ``script FOLDER ARGUMENTS`` as ranks 0 and 1.

    Returns:
        What each rank wrote as JSON to ``FOLDER/rank<N>.json``.

    Raises:
        AssertionError: a rank failed; the message ends with the output.
        subprocess.TimeoutExpired: they did not end in time.
    """
    build_operator()
    port = free_port()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--no_local_rank", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    try:
        run([*command, str(script), str(folder), *arguments], port, timeout)
    finally:
        for buffer in shared_buffers(port):
            buffer.unlink(missing_ok=True)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
