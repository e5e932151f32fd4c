"""What the step benchmark measures: model shapes, batches, goals. Plain data only."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama of bfloat16 random weights; widths in elements."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int = 5632
    vocabulary: int = 32000

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's K and V in all layers."""
        return self.layers * self.kv_heads * self.head_size * 2 * 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights but the norms'."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return 2 * (self.layers * layer + 2 * self.vocabulary * self.hidden)

    def step_bytes(self, batch: int, rows: int) -> int:
        """What a decode step of `batch` sequences of `rows` rows must read: all weights but the
        embedding's, and K and V."""
        embedding = 2 * self.vocabulary * self.hidden
        return self.weight_bytes - embedding + batch * rows * self.row_bytes


@dataclass(frozen=True)
class StepCase:
    """A decode batch: `batch` sequences of `rows` KV rows when timing starts.

    `goal`: CPU_ATTN's time over BMC's that should be reached at least, or None.
    """

    name: str
    shape: Shape
    batch: int
    rows: int
    goal: float | None = None

    def pool_bytes(self, steps: int) -> int:
        """KV pool for the batch and `steps` new rows each, with room for chunks begun."""
        rows = self.rows + steps + 512
        return int(1.1 * self.batch * rows * self.shape.row_bytes)

    def memory_bytes(self, steps: int) -> int:
        """What one engine takes: pool, weights and their packed copies, vLLM itself."""
        return self.pool_bytes(steps) + 2 * self.shape.weight_bytes + (3 << 29)


MHA = Shape("mha", layers=8, hidden=2048, heads=32, kv_heads=32, head_size=64)
GQA = Shape("gqa", layers=8, hidden=2048, heads=16, kv_heads=4, head_size=128)

CASES = (
    StepCase("mha 8x2000", MHA, 8, 2000, 1.5),
    StepCase("mha 16x4000", MHA, 16, 4000, 1.6),
    StepCase("gqa 16x8000", GQA, 16, 8000, 1.3),
)


def select(only: str | None) -> list[StepCase]:
    """The cases whose name contains a match.

    Raises:
        ValueError: `only` is no regular expression or matches none.
    """
    if only is None:
        return list(CASES)
    try:
        chosen = [case for case in CASES if re.search(only, case.name)]
    except re.error as error:
        raise ValueError(f"--only is {only!r}, no regular expression: {error}") from None
    if not chosen:
        names = [case.name for case in CASES]
        raise ValueError(f"--only is {only!r}; allowed: part of one of {names}")
    return chosen
