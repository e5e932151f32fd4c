"""What every test begins with, and which tests start an engine or a server."""

import signal
from collections.abc import Iterator

import pytest

from bmc_core import log

RUNS = ("test_run.py", "test_contract.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by what a test uses, so that no test can be forgotten.

    ``engine``: a model for a vLLM engine (`model_dir`); ``server``: all of tests/server;
    ``run``: the files in which a benchmark runs from start to end. Tests that start an engine in
    some other way carry the mark themselves.
    """
    for item in items:
        if "server" in item.path.parts:
            item.add_marker(pytest.mark.server)
        elif "benchmarks" in item.path.parts and item.path.name in RUNS:
            item.add_marker(pytest.mark.run)
        elif "model_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.engine)


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
