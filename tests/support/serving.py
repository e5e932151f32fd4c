"""A real `vllm serve` in a process group of its own, for tests: started, watched and ended.

Promises: a server that does not come up fails the test with the end of its log; nothing of it
is left when `stop` returns, nor when the test run is killed.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

START_SECONDS = 240  # about 50 on two idle cores; shared and cold ones need more
STOP_SECONDS = 20
PR_SET_PDEATHSIG = 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Runs in the child: the server ends when the test process is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def environment(**extra: str) -> dict[str, str]:
    """Settings that make a server small, offline and the same everywhere."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    bin_dir = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


class Server:
    """One running server; `command` must end in a process that answers on `port`."""

    def __init__(self, command: list[str], port: int, log: Path, env: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        # The loopback address must not be sent through a proxy of the environment.
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=env, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def log_tail(self, lines: int = 60) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Returns when /health answers 200; a failure carries the end of the log."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            code = self.process.poll()
            if code is not None:
                raise AssertionError(f"the server ended with {code}:\n{self.log_tail()}")
            try:
                if self.http.get("/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"no answer from the server in {seconds} s:\n{self.log_tail()}")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels (and engines); KeyError when it is not there."""
        pattern = re.compile(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", re.MULTILINE)
        values = pattern.findall(self.http.get("/metrics").text)
        if not values:
            raise KeyError(f"/metrics has no {name}")
        return sum(map(float, values))

    def remaining(self) -> list[psutil.Process]:
        """Processes of the server's session that are alive (zombies are not)."""
        alive = []
        for process in psutil.process_iter():
            try:
                ours = os.getsid(process.pid) == self.process.pid
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return alive

    def end_with(self, number: signal.Signals, whole_group: bool = False) -> float:
        """Send a signal, wait for all processes to be gone; seconds that it took.

        `whole_group` is what a terminal does on Ctrl-C.
        """
        start = time.monotonic()
        if whole_group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running {STOP_SECONDS} s after {number.name}:\n{self.log_tail()}"
            ) from None
        while (left := self.remaining()) and time.monotonic() - start < STOP_SECONDS:
            time.sleep(0.2)
        assert not left, f"left behind after {number.name}: {left}\n{self.log_tail()}"
        return time.monotonic() - start

    def stop(self) -> None:
        """End it whatever its state: politely, then by force."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        for process in self.remaining():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(STOP_SECONDS)
