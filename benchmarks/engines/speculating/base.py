"""What a speculator is: a framework with a target and a draft in it that continues prompts.

Promises that a turn is timed where it is done, from the first token of the last prompt on, and that
what became of the draft tokens is counted the same way everywhere. Knows nothing of any framework.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.engines.base import collector_off
from benchmarks.lib.chain import ChainLlama
from benchmarks.lib.timing import Budget, orders

Length = int | str
"""Draft tokens of a step: a number, `NONE`, `DEFAULT` or `AUTO`."""
NONE = "none"
"""No speculation is configured."""
DEFAULT = "default"
"""The framework's own way of choosing, with its default settings."""
AUTO = "auto"
"""BMC's controller."""
FIXED = "fixed"
"""The mode of a speculator that takes any number."""

NGRAM, DRAFT = "ngram", "draft"
"""Where draft tokens come from."""
SETTLE_SECONDS = 0.25
"""Between turns of two processes: longer than an idle OpenMP thread spins (libiomp5: 0.2 s)."""


class Setup(NamedTuple):
    """What speculators are started with.

    Attributes:
        target, draft: Hugging Face folders, or chains, which have one; `draft` is None for n-gram.
            Those that work in this process need chains.
        dtype: of weights, K and V, by torch's name.
        method: `NGRAM` or `DRAFT`.
        max_draft_tokens: largest number that a step is asked for.
        batch: prompts of a turn.
        rows: longest prompt. new: tokens that each gets.
        row_bytes: of one row's K and V in target and draft.
        weight_bytes: of both.
    """

    target: Path | ChainLlama
    draft: Path | ChainLlama | None
    dtype: str
    method: str
    max_draft_tokens: int
    batch: int
    rows: int
    new: int
    row_bytes: int
    weight_bytes: int

    @property
    def pool_rows(self) -> int:
        """Rows of a KV pool: prompts stay in it between turns."""
        per_request = self.rows + self.new + 4 * self.max_draft_tokens + 256
        return 2 * self.batch * per_request


def folder_of(model: Path | ChainLlama) -> str:
    """Where its configuration and weights are; a chain's are written at the first call."""
    return str(model.folder() if isinstance(model, ChainLlama) else model)


@dataclass
class Turn:
    """What became of prompts that were continued once, without the time until each had its first
    token.

    Attributes:
        seconds: until every prompt had its tokens.
        tokens: of all prompts in that time.
        steps: forwards of the target.
        outputs: of each prompt, its first tokens.
        drafted_for: how often a request had draft tokens in a step.
        proposed: draft tokens that were verified.
        examined: of them, those up to the first that was rejected, it included.
        accepted: of them.
        forward_seconds: in the target's forwards.
        drafting_seconds: in making draft tokens. Where a framework does not tell: outside forwards.
        draft_steps: steps of the drafter in that time.
    """

    seconds: float
    tokens: int
    steps: int
    outputs: list[list[int]] = field(repr=False)
    drafted_for: int = 0
    proposed: int = 0
    examined: int = 0
    accepted: int = 0
    forward_seconds: float = 0.0
    drafting_seconds: float = 0.0
    draft_steps: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Speculator(ABC):
    """One framework in one mode. Call `start` once, `turn` as often as wanted, `close` at the end,
    also after an error.

    Attributes:
        name: of the system: "bmc_vllm", "cpu_attn", "dynamic", "bmc", "deepspeed", "bmc_deepspeed".
        title: in tables.
        peer: whether it is what BMC is compared with.
        mode: `NONE`, `FIXED`, `DEFAULT` or `AUTO`.
        process: "" where it works in this process, else a name for its own.
        threads, openmp: that it works with, once it is started; the OpenMP runtime by file name.
    """

    name: str
    title: str
    peer: bool
    mode: str
    process: str = ""
    threads: int = 0
    openmp: str = ""

    @abstractmethod
    def start(self, setup: Setup) -> None:
        """Loads target and draft."""

    @abstractmethod
    def turn(self, prompts: Sequence[Sequence[int]], new: int, length: Length) -> Turn:
        """Continues every prompt greedily until it has at least `new` tokens.

        Args:
            length: a number where the mode is `FIXED`, else the mode.
        """

    @abstractmethod
    def start_bytes(self, setup: Setup) -> int:
        """What `start` and turns take at most."""

    @abstractmethod
    def close(self) -> None:
        """Gives memory and processes back; may be called twice, and before `start`."""


class Contender(NamedTuple):
    """A speculator with a length: what takes turns."""

    speculator: Speculator
    length: Length

    @property
    def key(self) -> tuple[str, Length]:
        return self.speculator.name, self.length


def take_turns(
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    new: int,
    rounds: int,
    budget: Budget,
    tell: Callable[[float], None] = lambda fraction: None,
) -> Mapping[tuple[str, Length], list[Turn]]:
    """Every contender's timed turns, in another order in every round; before them one that is not
    timed, in which prompts are prefilled and the controller meets the draft.

    Args:
        rounds: turns of each; fewer where the budget is spent, but one.
    """
    turns: dict[tuple[str, Length], list[Turn]] = {one.key: [] for one in contenders}
    before: str | None = None
    parts = (rounds + 1) * len(contenders)
    done = 0

    def turn(one: Contender) -> Turn:
        nonlocal before, done
        tell(done / parts)
        done += 1
        if before is not None and before != one.speculator.process:
            time.sleep(SETTLE_SECONDS)
        before = one.speculator.process
        return one.speculator.turn(prompts, new, one.length)

    for one in contenders:
        turn(one)
    with collector_off():
        for number, order in enumerate(orders(len(contenders))):
            if number == rounds or (number and budget.is_spent()):
                break
            for place in order:
                turns[contenders[place].key].append(turn(contenders[place]))
    return turns
