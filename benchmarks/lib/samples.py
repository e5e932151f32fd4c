"""What a table says of a few samples.

Promises no spread where there is none: the quartiles of two samples are the two. Knows nothing of
who took them.
"""

from __future__ import annotations

import math

from benchmarks.lib.timing import Timing

MIN_FOR_SPREAD = 3


def spread_of(timing: Timing) -> float:
    """Distance of the quartiles over the median; NaN with fewer than `MIN_FOR_SPREAD` samples."""
    return timing.spread if timing.calls >= MIN_FOR_SPREAD else math.nan


def percent(share: float, digits: int = 0) -> str:
    """ "-" for NaN."""
    return "-" if math.isnan(share) else f"{share:.{digits}%}"


def error_text(error: float) -> str:
    """Of a relative error; "-" for NaN: nothing to compare with."""
    return "-" if math.isnan(error) else f"{error:.0e}"
