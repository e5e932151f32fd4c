"""How much of a KV pool is in memory, measured beside the steps.

Promises that a step pays for a flag and nothing else: a thread of the lowest priority looks at the
pages soon after a change, at most every two seconds, and for at most 1/200 of the time. A pool that
was committed at the start changes only where the system swaps: it is looked at once a minute. The
thread ends with the pool. Knows nothing of what is done with the figures.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable

from bmc_vllm.memory import KVPoolMemory

SHARED_SECONDS = 2.0
COMMITTED_SECONDS = 60.0
SHARE = 200
"""A measurement is followed by a pause of so many seconds, and of 200 times what it took."""


class ResidencyMeter:
    """Reports the resident bytes of a pool after it may have changed.

    Args:
        memory: the pool. The meter keeps it alive no longer than a measurement.
        report: takes the resident bytes, in a thread of the meter.
        seconds: pause after a measurement; None: what suits the pool.
    """

    def __init__(
        self, memory: KVPoolMemory, report: Callable[[int], None], seconds: float | None = None
    ) -> None:
        if seconds is None:
            seconds = SHARED_SECONDS if memory.shared else COMMITTED_SECONDS
        self._changed = threading.Event()
        closed = threading.Event()
        weakref.finalize(self, _close, closed, self._changed)
        threading.Thread(
            target=_run,
            args=(weakref.ref(memory), report, seconds, self._changed, closed),
            name="bmc-residency",
            daemon=True,
        ).start()

    def changed(self) -> None:
        """Pages may have come or gone since the last measurement."""
        if not self._changed.is_set():
            self._changed.set()


def _close(closed: threading.Event, changed: threading.Event) -> None:
    closed.set()
    changed.set()


def _run(
    pool: weakref.ref[KVPoolMemory],
    report: Callable[[int], None],
    seconds: float,
    changed: threading.Event,
    closed: threading.Event,
) -> None:
    with contextlib.suppress(OSError, AttributeError):  # On Linux a thread has its own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    while True:
        changed.wait()
        memory = pool()
        if memory is None or closed.is_set():
            return
        changed.clear()
        start = time.monotonic()
        report(memory.resident_bytes())
        del memory
        if closed.wait(max(seconds, SHARE * (time.monotonic() - start))):
            return
