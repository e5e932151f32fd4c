"""An end to what would wait for ever."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails in the block, also out of a system call, when its time is over.

    By AssertionError: a TimeoutError is an OSError, which the block may take for an answer.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not finished within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
