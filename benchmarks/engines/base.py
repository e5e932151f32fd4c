"""What an engine is: a framework with a model in it that decodes a batch of sequences.

Promises that every framework is started, filled, stepped and asked for logits and tokens by the
same calls, wherever it runs, and that a step is timed where it is done. Knows nothing of any
particular framework.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from benchmarks.lib.llama import LlamaShape, RandomLlama
from benchmarks.lib.timing import SETTLE_SECONDS, Budget, orders
from bmc_core.machine.memory import available_bytes


class Batch(NamedTuple):
    """Sequences of one length.

    Attributes:
        sequences: how many.
        rows: of K and V that each has when stepping begins.
        new_rows: that each may get after them, in all steps together.
    """

    sequences: int
    rows: int
    new_rows: int


class Step(NamedTuple):
    """One decode step; `grew`: whether the cache grew in it."""

    seconds: float
    grew: bool = False


class Counted(NamedTuple):
    """What a cache counted since it was filled."""

    growths: int
    bytes_copied: int
    bytes_reserved: int


class Engine(ABC):
    """One framework, with or without BMC.

    Call `start` once, then `generate`, or `fill` and after it `logits` and `step`, as often as
    wanted, and `empty` after each batch; `close` at the end, also after an error. The model is a
    `RandomLlama`; all engines of a run get the same one, and fill their caches with the same rows
    where they can.

    Attributes:
        name: in documents; one of `benchmarks.engines.NAMES`.
        title: in tables.
        peer: whether it is what BMC is compared with.
        reference: name of the engine whose logits it must have after the same `fill`; its own
            where its framework computes otherwise than all others.
        process: "" where it works in this process, else a name for its own.
        threads: that it works with, once it is started.
    """

    name: str
    title: str
    peer: bool = False
    reference: str
    process: str = ""
    threads: int

    @abstractmethod
    def start(self, model: RandomLlama, largest: Batch) -> None:
        """Loads the model; no later batch has more sequences, rows or new rows than `largest`.

        Raises:
            WorkerError: the process that it works in cannot do it.
        """

    @abstractmethod
    def fill(self, batch: Batch) -> None:
        """Gives every sequence of a new batch `batch.rows` rows; what was there before is gone."""

    @abstractmethod
    def step(self, count: int) -> list[Step]:
        """`count` decode steps, each with a token for every sequence, timed where they are done."""

    @abstractmethod
    def logits(self) -> torch.Tensor:
        """One decode step that is not timed; returns its float32 logits
        `[sequences, vocabulary]`."""

    def replay(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """What `logits` gives after the last `fill` and these tokens, int64 `[sequences, steps]`,
        whoever chose them; steps since that `fill` are gone. None where it cannot be told."""
        return None

    @abstractmethod
    def tokens(self) -> list[list[int]]:
        """Of each sequence, the greedy tokens of all steps since `fill`."""

    @abstractmethod
    def generate(self, prompts: torch.Tensor, new: int) -> torch.Tensor:
        """Greedy generation as a user calls it, of int64 prompts `[sequences, rows]`; returns all
        tokens `[sequences, rows + new]`. What `fill` has put there is gone."""

    def wear(self) -> None:  # noqa: B027
        """Leaves what `fill` takes its memory from as after long service, where that matters."""

    def counted(self) -> Counted | None:
        """None where the framework does not count."""
        return None

    def start_bytes(self, shape: LlamaShape, largest: Batch) -> int:
        """What `start` takes at most beyond the model that all engines in this process share."""
        return 0

    def fill_bytes(self, shape: LlamaShape, batch: Batch) -> int:
        """What `fill` and the steps after it take at most; `empty` gives it back."""
        rows = batch.rows + batch.new_rows
        return batch.sequences * rows * shape.row_bytes

    @abstractmethod
    def empty(self) -> None:
        """Gives back what `fill` took; may be called twice. The next call is `fill` or
        `generate`."""

    @abstractmethod
    def close(self) -> None:
        """Gives memory and processes back; may be called twice, and before `start`."""


class Turns(NamedTuple):
    """Timed steps by engine, and how many rounds there was time for."""

    steps: dict[str, list[Step]]
    rounds: int


WAKING_STEPS = 1
"""Steps at the start of a turn that are not timed: threads slept, caches have another's rows."""


def take_turns(
    engines: Mapping[str, Engine],
    rounds: int,
    count: Callable[[Engine], int],
    budget: Budget,
    tell: Callable[[float], None] = lambda fraction: None,
) -> Turns:
    """The timed steps of each engine: whatever drifts meets all of them alike, and each follows
    others than before in every round. A turn begins with `WAKING_STEPS` steps, whosever it is.

    Args:
        engines: filled, by name.
        rounds: turns of each; fewer where the budget is spent, but one.
        count: timed steps of an engine's turn.
        tell: is told the fraction of the rounds done.
    """
    steps: dict[str, list[Step]] = {name: [] for name in engines}
    names = list(engines)
    before = None
    done = 0
    with collector_off():
        for order in orders(len(names)):
            if done == rounds or (done and budget.is_spent()):
                break
            tell(done / rounds)
            for name in (names[place] for place in order):
                engine = engines[name]
                if before is not None and before != engine.process:
                    time.sleep(SETTLE_SECONDS)
                before = engine.process
                engine.step(WAKING_STEPS)
                steps[name] += engine.step(count(engine))
            done += 1
    return Turns(steps, done)


@contextmanager
def collector_off() -> Iterator[None]:
    """No garbage is collected while steps are timed."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def lacking_memory(
    engines: Mapping[str, Engine],
    shape: LlamaShape,
    batch: Batch,
    largest: Batch | None = None,
    model_bytes: int = 0,
) -> str | None:
    """Why the engines do not fit together; None: they do.

    Args:
        batch: that they shall be filled with.
        largest: what they shall be started with before; None: they are started.
        model_bytes: of a model in this process that is still to be made.
    """
    needed = model_bytes
    for engine in engines.values():
        needed += engine.fill_bytes(shape, batch)
        needed += 0 if largest is None else engine.start_bytes(shape, largest)
    free = available_bytes()
    if needed <= free:
        return None
    return f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
