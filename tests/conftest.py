"""What every test begins with."""

import pytest

from bmc_core import log


@pytest.fixture(autouse=True)
def _log_lines_are_new() -> None:
    """Each test sees the log lines that a process logs only once."""
    log.forget()
