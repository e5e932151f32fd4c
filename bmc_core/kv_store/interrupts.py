"""Ctrl-C while rows move: it is raised when they have arrived.

A growth takes long enough to be what an interrupt hits; half moved rows would be wrong ones, with
nothing to show for it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Postpones SIGINT to the end of the block, or of the outermost of several.

    Only the main thread is interrupted by signals; in others, and where the handler is not
    Python's, nothing is done.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[-1])
