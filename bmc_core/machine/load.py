"""Other processes on the machine, which make every measurement worse.

Promises a share of all cores, or None where the system does not tell. Knows nothing of what is
measured.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY = 0.05
"""Share of the cores in others' hands from which a measurement is said to be disturbed."""
MIN_SECONDS = 0.2
"""The system counts in hundredths of a second: a shorter time says nothing."""


class Neighbors:
    """How much of the machine other processes take, from construction to `share`."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of all cores busy, of this process and its ended children, of the clock."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.monotonic()

    def share(self) -> float | None:
        """Of all cores, 0 to 1; None: too early to tell, or the system does not.

        Children that still live count as others.
        """
        now = self._now()
        if now is None or self._before is None:
            return None
        busy, own, clock = (b - a for a, b in zip(self._before, now, strict=True))
        if clock < MIN_SECONDS:
            return None
        available = clock * (os.cpu_count() or 1)
        return min(1.0, max(0.0, busy - own) / available)
