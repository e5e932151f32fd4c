"""vLLM's engine in a process of its own, with BMC's attention backend or its own, CPU_ATTN.

Promises that both are the same vLLM with the same thread binding and the same rows, written by
their own backend. Knows nothing of the engine beside it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

from benchmarks.engines.base import Batch
from benchmarks.engines.worker_engine import WorkerEngine
from benchmarks.lib.llama import LlamaShape, RandomLlama
from benchmarks.lib.worker_client import WorkerError, WorkerProcess, worker_command

WORKER = Path(__file__).with_name("vllm_worker.py")
TREE = Path(__file__).resolve().parents[2]
BACKENDS = {"bmc_vllm": "BMC", "cpu_attn": "CPU_ATTN"}
TURNOVERS = 10
"""How often a worn pool was used through."""
MARGIN = 64
"""Rows for the tokens that sequences get while others are still prefilled."""


class VLLM(WorkerEngine):
    """vLLM over the model's folder.

    Args:
        name: a key of `BACKENDS`.
        bind: value of VLLM_CPU_OMP_THREADS_BIND; "": vLLM's own default.
        compile: with torch.compile.
        drawn: see `vllm_worker.Worker.fill`.

    """

    reference = "cpu_attn"

    def __init__(
        self, name: str, bind: str = "", *, compile: bool = False, drawn: bool = True
    ) -> None:
        self.name, self.title, self.peer = name, BACKENDS[name], name == "cpu_attn"
        self.process = f"vLLM, {self.title}"
        self.bind = bind
        self.compile = compile
        self.drawn = drawn
        self.threads = 0

    def start(self, model: RandomLlama, largest: Batch) -> None:
        self.worker = WorkerProcess(
            self.process,
            worker_command(sys.executable, WORKER),
            environment(self.bind, self.folder),
        )
        answer = self._ask(
            "start",
            model=str(model.folder()),
            dtype=model.shape.dtype,
            backend=self.title,
            batch=largest.sequences,
            rows=largest.rows + largest.new_rows + MARGIN,
            pool_bytes=pool_bytes(model.shape, largest),
            compile=self.compile,
        )
        self.threads = answer["threads"]
        if answer["backends"] != [self.title]:
            raise WorkerError(
                f"{self.process}: its layers attend with {', '.join(answer['backends'])}; "
                f"allowed: {self.title}"
            )

    def fill(self, batch: Batch) -> None:
        self._ask(
            "fill",
            batch=batch.sequences,
            rows=batch.rows,
            new=batch.new_rows + MARGIN,
            drawn=self.drawn,
        )

    def logits(self) -> torch.Tensor:
        path = self.folder / "logits.pt"
        self._ask("logits", path=str(path))
        return torch.load(path, weights_only=True)

    def start_bytes(self, shape: LlamaShape, largest: Batch) -> int:
        """Pool, weights and their packed copies, vLLM itself."""
        return pool_bytes(shape, largest) + 2 * shape.weight_bytes + (3 << 29)

    def fill_bytes(self, shape: LlamaShape, batch: Batch) -> int:
        """None: the pool is there since `start`."""
        return 0

    def wear(self) -> None:
        self._ask("wear", turnovers=TURNOVERS)


def pool_bytes(shape: LlamaShape, batch: Batch) -> int:
    """KV pool for the batch and its new rows, and a quarter more, as servers have it."""
    rows = batch.rows + batch.new_rows + MARGIN + 128
    return int(1.25 * batch.sequences * rows * shape.row_bytes)


def environment(bind: str, cache: Path, openmp: str = "libgomp") -> dict[str, str]:
    """Variables of an engine. What vLLM preloads for its own worker processes is preloaded here as
    well, since the engine runs in the worker itself. `openmp`: see `preloads`."""
    search = [str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **({"VLLM_CPU_OMP_THREADS_BIND": bind} if bind else {}),
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(map(str, preloads(openmp))),
        "PYTHONPATH": os.pathsep.join(search),
    }


def preloads(openmp: str = "libgomp") -> list[Path]:
    """vLLM's allocator and an OpenMP runtime, where they are: "libgomp" is torch's own, "libiomp5"
    Intel's, which vLLM advises for speculation.

    Raises:
        ImportError: libiomp5 is not installed.
    """
    found: list[Path] = []
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "libs"
        found += sorted(folder.glob("libtcmalloc*.so*"))[:1]
    if openmp == "libgomp":
        return found + sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]
    intel = Path(sys.prefix) / "lib" / "libiomp5.so"
    if not intel.exists():
        raise ImportError(f"libiomp5 is not at {intel}; pip install intel-openmp")
    return [*found, intel]
