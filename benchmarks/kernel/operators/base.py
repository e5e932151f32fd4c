"""What a benchmarked operator is: it takes a case's inputs and gives a trial that can be timed.

Promises that every operator is loaded, checked and timed by the same steps. Knows nothing of any
particular one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from benchmarks.kernel.cases import Case
from benchmarks.kernel.inputs import Inputs
from benchmarks.lib.answers import relative_error
from benchmarks.lib.timing import Timed
from bmc_core.machine.memory import prefer_huge_pages


class Unusable(Exception):  # noqa: N818 - reads as a state of the system
    """A system that was asked for cannot run here; the message says why."""


class Arena:
    """Memory for rotating sets, touched once and used again for the next case.

    Args:
        target: bytes that the sets of one case should cover at least.
        largest: bytes of the largest set that is to come: with it the memory is taken only once,
            also where the trials of a group, which share it, differ in size.
        huge_pages: ask the system for huge pages, as the system that is timed does for its pool.
    """

    def __init__(self, target: int, largest: int = 0, *, huge_pages: bool = False) -> None:
        self.target = target
        self.huge_pages = huge_pages
        self._capacity = target + 2 * largest + largest // 4
        self._memory = torch.empty(0, dtype=torch.uint8)

    def sets(self, shape: tuple[int, ...], dtype: torch.dtype, used: int) -> list[torch.Tensor]:
        """As many tensors `shape` as cover the target with the `used` bytes of each, and one more.

        They hold anything.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        stride = -(-size // 4096) * 4096
        count = -(-self.target // used) + 1
        if self._memory.numel() < count * stride:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one first
            size_of_all = max(count * stride, self._capacity)
            self._memory = torch.empty(size_of_all, dtype=torch.uint8)
            if self.huge_pages:
                prefer_huge_pages(self._memory)
        parts = [self._memory[i * stride : i * stride + size] for i in range(count)]
        return [part.view(dtype).view(shape) for part in parts]

    def release(self) -> None:
        """Gives the memory back, once the tensors handed out are gone."""
        self._memory = torch.empty(0, dtype=torch.uint8)


class Trial(Timed):
    """One system on one case, loaded and ready.

    Attributes:
        case, inputs: as given to `Operator.prepare`.
        sets: number of rotating sets.
        remark: what a reader should know about this system on this case; "" for nothing.
    """

    remark: str = ""

    def __init__(self, case: Case, inputs: Inputs, threads: int) -> None:
        self.case = case
        self.inputs = inputs
        self.threads = threads
        self.sets = 1

    def enter(self) -> None:
        torch.set_num_threads(self.threads)

    def call(self, index: int) -> None:
        if self.case.kind == "write":
            self.write(index % self.sets)
        else:
            self.attend(index % self.sets)

    @abstractmethod
    def load(self) -> None:
        """Writes all K and V rows into set 0; for a write case the step's rows hold NaN."""

    @abstractmethod
    def replicate(self) -> None:
        """Copies set 0 to the others."""

    @abstractmethod
    def attend(self, number: int) -> None:
        """The timed attention on set `number`."""

    @abstractmethod
    def write(self, number: int) -> None:
        """The timed write of the step's new rows into set `number`."""

    @abstractmethod
    def poison(self) -> None:
        """Makes every element of the output NaN."""

    @abstractmethod
    def output(self) -> torch.Tensor:
        """`[query rows, query heads, head size]` of the last attention."""

    def check(self) -> float:
        """Error of the answer on set 0, relative to the reference (`inputs.relative_error`)."""
        self.enter()
        self.load()
        self.poison()
        self.call(0)
        if self.case.kind == "write":
            self.attend(0)
        return relative_error(self.output(), self.inputs.reference)


def rows_to_load(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as `Trial.load` writes them: NaN where the timed write will write."""
    if inputs.case.kind != "write":
        return inputs.key, inputs.value
    key, value = inputs.key.clone(), inputs.value.clone()
    key[inputs.last_rows] = float("nan")
    value[inputs.last_rows] = float("nan")
    return key, value


class Operator(ABC):
    """One way to compute attention.

    Attributes:
        name: in JSON rows.
        title: in tables and in goals.
        isa: instruction set in use, as far as it is known.
    """

    name: str
    title: str
    isa: str

    @abstractmethod
    def refusal(self, case: Case) -> str | None:
        """Why the system does not take the case; None if it does."""

    @abstractmethod
    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Trial:
        """A trial whose memory may be shared with this system's other trials of the same group."""

    @abstractmethod
    def close(self) -> None:
        """Gives memory and processes back; may be called twice."""
