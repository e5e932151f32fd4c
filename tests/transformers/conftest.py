import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _forget_what_was_said():
    """Each test sees the log lines that are said only once."""
    from bmc_transformers import log

    log._said.clear()
