"""SlabPool: AMD's pace-vllm, in a worker process of the Python environment that has it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.kernel.cases import Case
from benchmarks.kernel.inputs import Inputs
from benchmarks.kernel.operators.base import Operator, Trial, Unusable
from benchmarks.lib.answers import relative_error
from benchmarks.lib.worker_client import WorkerError, WorkerProcess, worker_command

WORKER = Path(__file__).with_name("slabpool_worker.py")
START_SECONDS = 120.0
CALL_SECONDS = 120.0


class SlabPool(Operator):
    """`torch.classes.pace.SlabPool` in another process, timed there, in turns with ours.

    Args:
        target: bytes that the rotating sets cover.
        python: the interpreter of an environment that has pace-vllm.

    Raises:
        Unusable: the interpreter, the package or the processor does not do.
    """

    name = "slabpool"
    title = "SlabPool"

    def __init__(self, target: int, python: Path) -> None:
        self.target = target
        self.folder = tempfile.TemporaryDirectory(prefix="bmc-benchmarks-")
        try:
            self.worker = WorkerProcess(f"--pace-python {python}", worker_command(python, WORKER))
            try:
                answer = self.worker.ask(START_SECONDS, do="hello")
            except WorkerError:
                self.worker.close()
                raise
        except WorkerError as error:
            self.folder.cleanup()
            raise Unusable(str(error)) from None
        self.version = str(answer["pace"])
        self.isa = f"pace-vllm {self.version}, torch {answer['torch']}"

    def refusal(self, case: Case) -> str | None:
        if case.dtype != "bfloat16" or case.cache:
            return "takes bfloat16 only"
        if case.run_rows or case.table_factor > 1 or case.block_size or case.threads:
            return "chooses its own blocks"
        if case.group:
            return "is compared case by case"
        return None

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Trial:
        return _SlabPoolTrial(case, inputs, threads, self)

    def close(self) -> None:
        self.worker.close()
        self.folder.cleanup()


class _SlabPoolTrial(Trial):
    process = "SlabPool"

    def __init__(self, case: Case, inputs: Inputs, threads: int, system: SlabPool) -> None:
        super().__init__(case, inputs, threads)
        self.worker = system.worker
        self.folder = Path(system.folder.name)
        self.sets = system.target // case.set_bytes + 2
        self.out = torch.empty(0)

    def enter(self) -> None:
        """Its threads were set by `load`, in its own process."""

    def load(self) -> None:
        case, inputs = self.case, self.inputs
        is_write = case.kind == "write"
        stored = list(case.seq_lens)
        keep = torch.ones(inputs.key.shape[0], dtype=torch.bool)
        if is_write:  # it appends: the new rows are not there before
            stored = [n - new for n, new in zip(stored, case.query_lens, strict=True)]
            keep[inputs.last_rows] = False
        path = self.folder / "inputs.pt"
        torch.save(
            {
                "query": inputs.query,
                "key": inputs.key[keep],
                "value": inputs.value[keep],
                "new_key": inputs.key[inputs.last_rows],
                "new_value": inputs.value[inputs.last_rows],
                "stored": stored,
                "query_lens": list(case.query_lens),
                "scale": inputs.scale,
                "is_write": is_write,
            },
            path,
        )
        self.worker.ask(
            CALL_SECONDS, do="prepare", inputs=str(path), sets=self.sets, threads=self.threads
        )
        path.unlink()

    def replicate(self) -> None:
        """`load` filled every set."""

    def call(self, index: int) -> None:
        self.measure(index)

    def measure(self, index: int) -> float:
        return float(self.worker.ask(CALL_SECONDS, do="call", index=index)["seconds"])

    def attend(self, number: int) -> None:
        path = self.folder / "output.pt"
        self.worker.ask(CALL_SECONDS, do="check", output=str(path))
        self.out = torch.load(path, weights_only=True)
        path.unlink()

    def write(self, number: int) -> None:
        """Part of what the worker does to be checked."""

    def poison(self) -> None:
        self.out = torch.full(self.inputs.query.shape, float("nan"))

    def check(self) -> float:
        self.load()
        self.poison()
        self.attend(0)
        return relative_error(self.out, self.inputs.reference)

    def output(self) -> torch.Tensor:
        return self.out
