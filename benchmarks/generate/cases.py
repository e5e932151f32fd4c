"""What the generate benchmark measures: batches. Plain data only."""

from __future__ import annotations

from typing import NamedTuple


class GenerateCase(NamedTuple):
    """A decode batch: `batch` sequences of about `rows` rows."""

    batch: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.rows}"


QUICK = (GenerateCase(8, 2000), GenerateCase(1, 2000), GenerateCase(8, 256))
FULL = tuple(GenerateCase(batch, rows) for batch in (1, 4, 8) for rows in (256, 1000, 2000, 4000))
GRID = "mean of the 12 cases"
"""The case of goals for the average over `FULL`."""
