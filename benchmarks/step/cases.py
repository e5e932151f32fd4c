"""What the step benchmark measures: model shapes, batches, goals. Plain data only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.lib.llama import GQA, MHA, Shape


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
