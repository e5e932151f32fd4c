"""vLLM with draft tokens in a process of its own, on BMC's attention backend or on CPU_ATTN.

Promises that both are the same vLLM with the same thread binding, OpenMP runtime, prompts and
drafts, and that the draft attends with the target's backend. Knows nothing of the engine beside it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.speculating.base import (
    AUTO,
    DRAFT,
    NONE,
    Length,
    Setup,
    Speculator,
    Turn,
    folder_of,
)
from benchmarks.engines.vllm import BACKENDS, environment
from benchmarks.lib.worker_client import WorkerError, WorkerProcess, worker_command

WORKER = Path(__file__).with_name("vllm_worker.py")
CALL_SECONDS = 600.0
LOOKUP = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
"""Tokens that n-gram compares: any one that was met, the longest match first."""


class VLLM(Speculator):
    """vLLM over the folders of target and draft.

    Args:
        name: a key of `BACKENDS`.
        mode: `NONE`, `FIXED` or, with BMC, `AUTO`.
        bind: value of VLLM_CPU_OMP_THREADS_BIND; "": vLLM's own default.
        openmp: which runtime is preloaded, "libgomp" or "libiomp5".
    """

    def __init__(self, name: str, mode: str, bind: str = "", openmp: str = "libgomp") -> None:
        if mode == AUTO and BACKENDS[name] != "BMC":
            raise ValueError(f"mode={mode!r} with {name}; allowed: bmc_vllm")
        self.name, self.title, self.mode = name, BACKENDS[name], mode
        self.peer = name == "cpu_attn"
        self.process = f"vLLM, {self.title}, draft tokens: {mode}"
        self._bind, self._runtime = bind, openmp
        self._worker: WorkerProcess | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, setup: Setup) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bmc-benchmarks-")
        variables = environment(self._bind, Path(self._folder.name), self._runtime)
        # With draft tokens only this one runs on CPUs everywhere; both sides get it.
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        self._worker = WorkerProcess(
            self.process, worker_command(sys.executable, WORKER), variables
        )
        answer = self._worker.ask(
            CALL_SECONDS,
            do="start",
            model=folder_of(setup.target),
            dtype=setup.dtype,
            backend=self.title,
            batch=setup.batch,
            rows=setup.rows + 2 * setup.new + 128,
            pool_bytes=setup.pool_rows * setup.row_bytes,
            speculative=self._speculative(setup),
            additional=self._additional(),
        )
        self.threads, self.openmp = answer["threads"], answer["openmp"]
        if answer["backends"] != [self.title]:
            raise WorkerError(
                f"{self.process}: its layers attend with {', '.join(answer['backends'])}; "
                f"allowed: {self.title}"
            )

    def _speculative(self, setup: Setup) -> dict[str, Any] | None:
        if self.mode == NONE:
            return None
        count = {"num_speculative_tokens": setup.max_draft_tokens}
        if setup.method == DRAFT:
            assert setup.draft is not None
            own = {"model": folder_of(setup.draft), "attention_backend": self.title}
            return {"method": "draft_model", **own, **count}
        return {"method": "ngram", **LOOKUP, **count}

    def _additional(self) -> dict[str, Any]:
        if self.peer or self.mode == NONE:
            return {}
        return {"bmc": {"draft_length": self.mode}}

    def turn(self, prompts: Sequence[Sequence[int]], new: int, length: Length) -> Turn:
        assert self._worker is not None, "start comes first"
        number = length if isinstance(length, int) else None
        answer = self._worker.ask(
            CALL_SECONDS, do="turn", prompts=[list(one) for one in prompts], new=new, length=number
        )
        return Turn(**answer)

    def start_bytes(self, setup: Setup) -> int:
        """Pool, weights with what packing them takes for a moment, vLLM itself."""
        return setup.pool_rows * setup.row_bytes + int(1.3 * setup.weight_bytes) + (3 << 28)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
