"""What the step benchmark measures: models and batches. Plain data only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.lib.llama import GQA, MHA, LlamaShape


@dataclass(frozen=True)
class StepCase:
    """A decode batch: `batch` sequences of `rows` KV rows when timing starts."""

    name: str
    shape: LlamaShape
    batch: int
    rows: int


CASES = (
    StepCase("mha 8x2000", MHA, 8, 2000),
    StepCase("mha 16x4000", MHA, 16, 4000),
    StepCase("gqa 16x8000", GQA, 16, 8000),
    StepCase("mha 1x2000", MHA, 1, 2000),
    StepCase("mha 8x256", MHA, 8, 256),
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
