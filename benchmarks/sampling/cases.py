"""What the sampling benchmark measures. Plain data only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

Mode = Literal["greedy", "temperature", "top-p"]


@dataclass(frozen=True)
class Case:
    """One step's sampling.

    Attributes:
        vocab: words.
        batch: requests.
        drafts: draft tokens of each; None: speculation is not configured.
        mode: greedy; temperature 1; temperature 1 and top-p 0.9.
    """

    vocab: int
    batch: int
    drafts: int | None
    mode: Mode

    @property
    def name(self) -> str:
        drafts = "no speculation" if self.drafts is None else f"k={self.drafts}"
        return f"{self.vocab // 1000}k {self.batch}x {drafts}, {self.mode}"

    @property
    def rows(self) -> int:
        """Rows of logits."""
        return self.batch * ((self.drafts or 0) + 1)


MODES: tuple[Mode, ...] = ("greedy", "temperature", "top-p")
SHAPES = ((1, 4), (8, None), (8, 0), (8, 4))
VOCABULARIES = (32000, 128256)
CASES = tuple(
    Case(vocab, batch, drafts, mode)
    for vocab, (batch, drafts), mode in product(VOCABULARIES, SHAPES, MODES)
)
TINY = (Case(1000, 2, 2, "top-p"), Case(1000, 2, None, "temperature"), Case(1000, 2, 2, "greedy"))
