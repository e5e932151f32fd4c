"""A worker process that answers numbered JSON requests, one line each.

Promises that a worker that ends, says nonsense or reports an error becomes an exception that says
so, with the end of what it printed. Knows nothing of what is asked.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOOP = Path(__file__).with_name("worker_loop.py")
TAIL_CHARACTERS = 1500
LINE_BYTES = 80
"""Of a line that is no answer, in its message."""


class WorkerError(Exception):
    """The worker could not do what was asked; the message says why."""


def worker_command(python: str | Path, worker: Path) -> list[str]:
    """Answers requests with the class `Worker` of a file, in that interpreter's environment."""
    return [str(python), str(LOOP), str(worker)]


class WorkerProcess:
    """A running worker.

    Args:
        title: what the messages call it.
        command: program and arguments; it reads requests from its standard input and answers on
            its standard output. Its error stream is kept for messages.
        environment: variables that differ from this process's.
        folder: working directory, None for this process's.
    """

    def __init__(
        self,
        title: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.title = title
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **(environment or {})},
                cwd=folder,
                bufsize=0,
            )
        except OSError as error:
            self._log.close()
            raise WorkerError(f"{title}: {command[0]} does not start: {error.strerror}") from None
        self._rest = b""
        self._number = 0

    def ask(self, timeout: float, **request: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            WorkerError: it has ended, answers "error", or does not answer this request in `timeout`
                seconds with a JSON object; but for "error", the worker is ended.
        """
        process = self._process
        assert process.stdin is not None
        self._number += 1
        numbered = {**request, "number": self._number}
        try:
            process.stdin.write(json.dumps(numbered).encode() + b"\n")
        except (BrokenPipeError, ValueError):
            raise self._ended() from None
        answer = self._parsed(self._line(timeout))
        if "error" in answer:
            raise WorkerError(f"{self.title}: {answer['error']}")
        return answer

    def _parsed(self, line: bytes) -> dict[str, Any]:
        """The answer in a line; what came after another is not known."""
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or answer.pop("number", None) != self._number:
            self._kill()
            raise WorkerError(
                f"{self.title}: answered {line[:LINE_BYTES]!r}; allowed: a JSON object with the "
                f"request's number, {self._number}{self._tail()}"
            )
        return answer

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self, timeout: float) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._kill()  # a late answer would be taken for the next request's
                    raise WorkerError(
                        f"{self.title}: no answer in {timeout:.0f} seconds{self._tail()}"
                    )
                piece = os.read(stream.fileno(), 65536)
                if not piece:
                    raise self._ended()
                self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _ended(self) -> WorkerError:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return WorkerError(f"{self.title}: the process ended with {how}{self._tail()}")

    def _tail(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - TAIL_CHARACTERS))
        text = self._log.read().decode(errors="replace").strip()
        return f"; it printed:\n{text}" if text else ""

    def close(self) -> None:
        """Ends the worker: its input is closed, and if it stays it is killed. May be repeated."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
