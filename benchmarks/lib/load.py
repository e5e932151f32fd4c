"""Requests that a server gets, drawn from a seed: prompts of mixed lengths that share beginnings.

Knows nothing of who serves them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

VOCABULARY = 1 << 30


class Drawn(NamedTuple):
    """One request of a load: its prompt, and how many tokens it gets."""

    prompt: list[int]
    outputs: int


@dataclass(frozen=True)
class Load:
    """A closed loop: as soon as a request ends, the next one waits.

    Attributes:
        name: of the load.
        requests: that run at once, if they fit.
        pool_rows: rows of K and V in the pool.
        caching: prefix caching.
        prompts, outputs: bounds of their lengths, uniform.
        prefixes: that half of the prompts share, 100 to 700 rows each; 0: none is shared.
        turns: share of requests that go on with what an earlier one has asked and been told.
    """

    name: str
    requests: int
    pool_rows: int
    caching: bool = True
    prompts: tuple[int, int] = (200, 1500)
    outputs: tuple[int, int] = (100, 400)
    prefixes: int = 12
    turns: float = 0.0

    @property
    def max_rows(self) -> int:
        return 4096 if self.turns else 2048

    def within(self, rows: int) -> Load:
        """With prompts and outputs that a model of so many rows takes; as they are, if it does."""
        outputs = min(self.outputs[0], rows // 4), min(self.outputs[1], rows // 2)
        longest = rows - outputs[1]
        prompts = min(self.prompts[0], longest // 2), min(self.prompts[1], longest)
        return replace(self, outputs=outputs, prompts=prompts)


class Requests:
    """The requests of a load, the same for every scheduler.

    Those that go on an earlier one depend on what has ended, and when; everything else is drawn
    from the seed alone.
    """

    def __init__(self, load: Load, seed: int = 0) -> None:
        self._load = load
        self._random = random.Random(seed)
        self._prefixes = [
            self._tokens(self._random.randint(100, 700)) for _ in range(load.prefixes)
        ]
        self._told: list[list[int]] = []

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(VOCABULARY) for _ in range(count)]

    def draw(self) -> Drawn:
        load, rng = self._load, self._random
        rows, outputs = rng.randint(*load.prompts), rng.randint(*load.outputs)
        going_on = rng.random() < load.turns
        if going_on and self._told:
            begin = self._told.pop(rng.randrange(len(self._told)))
            return Drawn(begin + self._tokens(rng.randint(20, 300)), outputs)
        begin = rng.choice(self._prefixes) if self._prefixes and rng.random() < 0.5 else []
        prompt = begin + self._tokens(max(50, rows - len(begin)))
        return Drawn(prompt[: load.prompts[1]], outputs)

    def ended(self, tokens: Sequence[int]) -> None:
        """A request has ended with these tokens, its prompt's first."""
        load = self._load
        if load.turns and len(tokens) + 300 + load.outputs[1] < load.max_rows:
            self._told = [*self._told[-60:], list(tokens)]
