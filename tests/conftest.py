"""What every test begins with."""

import signal
from collections.abc import Iterator

import pytest

from bmc_core import log


@pytest.fixture(autouse=True)
def _log_lines_are_new() -> None:
    """Each test sees the log lines that a process logs only once."""
    log.forget()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the run ignores it (nohup, a job of a script)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if before is not None:
        signal.signal(signal.SIGINT, before)
