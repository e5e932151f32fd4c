"""What the growth benchmark measures: which generations, with which r.

Promises plain data, but for the r that `auto_policy` picks. Knows nothing of clocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.growth.generation import ATTENTIONS, SHAPE
from benchmarks.lib.llama import LlamaShape
from bmc_core.costs.calibration import auto_policy
from bmc_core.costs.geometry import Geometry


@dataclass(frozen=True)
class Options:
    """A run: `lengths` are the N, `prompts` the P, `rows` the r of the sweep.

    Attributes:
        seconds: of the run, so that the longest N and later rounds may be left out; None: no limit.
        clock: what they are counted by, for tests.
    """

    lengths: Sequence[int]
    prompts: Sequence[int]
    threads: int
    rounds: int
    batch_size: int = 8
    attentions: Sequence[str] = ATTENTIONS
    rows: Sequence[int] = (8, 16, 32, 64, 128, 256)
    shape: LlamaShape = SHAPE
    calibration_seconds: float = 5.0
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic


class Run(NamedTuple):
    """One generation to be repeated. `limit`: told to the cache and the policy, if not None."""

    attention: str
    prompt_rows: int
    new_rows: int
    r: int
    limit: int | None
    picked: bool = False
    up_front: bool = False


def runs_of(options: Options, geometry: Geometry) -> list[Run]:
    """The sweep at the longest N, and for each N the picked r and all rows up front."""
    runs: list[Run] = []
    longest = max(options.lengths)
    for attention in options.attentions:
        for prompt in options.prompts:
            runs += [
                Run(attention, prompt, longest, r, None)
                for r in options.rows
                if r <= prompt + longest
            ]
            for new in options.lengths:
                limit = prompt + new
                policy = auto_policy(
                    geometry,
                    batch_size=options.batch_size,
                    prompt_rows=prompt,
                    total_rows=limit,
                    attention=attention,  # type: ignore[arg-type]
                )
                picked = policy.r
                runs.append(Run(attention, prompt, new, picked, limit, True, picked >= limit))
                if picked < limit:
                    runs.append(Run(attention, prompt, new, limit, limit, False, True))
    return runs
