"""Tiny runs of the kernel benchmark."""

from collections.abc import Callable

import pytest

from benchmarks.kernel.run import Report
from tests.support.kernel_cases import TINY_CASES, tiny_run


@pytest.fixture(scope="session")
def report() -> Report:
    """A run over every kind of case."""
    return tiny_run(TINY_CASES)


@pytest.fixture
def run_tiny() -> Callable[..., Report]:
    return tiny_run
