import pytest


@pytest.fixture(autouse=True)
def _forget_what_was_said():
    """Each test sees the log lines that are said only once."""
    from bmc_transformers import log

    log._said.clear()
