"""An engine whose framework works in a process of its own.

Promises that the process and its temporary folder end with `close`, and that the calls that are
the same for every worker are made in one place. Knows nothing of any framework.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines.base import Engine, Step
from benchmarks.lib.worker_client import WorkerProcess

CALL_SECONDS = 600.0
"""For a request; the longest ones build an engine, or run prompts through the model."""


class WorkerEngine(Engine):
    """`start` makes the `worker`, which answers steps, result, generate and empty."""

    worker: WorkerProcess | None = None
    _folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def folder(self) -> Path:
        """A temporary folder for both sides."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="bmc-benchmarks-")
        return Path(self._folder.name)

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.worker is not None, "start comes first"
        return self.worker.ask(CALL_SECONDS, do=do, **request)

    def step(self, count: int) -> list[Step]:
        return [Step(seconds) for seconds in self._ask("steps", count=count)["seconds"]]

    def tokens(self) -> list[list[int]]:
        return self._ask("result")["tokens"]

    def generate(self, prompts: torch.Tensor, new: int) -> torch.Tensor:
        return torch.tensor(self._ask("generate", prompts=prompts.tolist(), new=new)["tokens"])

    def empty(self) -> None:
        self._ask("empty")

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
