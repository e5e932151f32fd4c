"""Who else uses the cores."""

import subprocess
import sys
import time

import pytest

from bmc_core.machine.load import Neighbors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="read from /proc/stat")

BURN = "import time; end = time.time() + 1.0\nwhile time.time() < end: pass"


def test_another_process_is_seen() -> None:
    neighbors = Neighbors()
    assert neighbors.share() is None, "nothing can be told after so short a time"
    with subprocess.Popen([sys.executable, "-c", BURN]):
        time.sleep(0.8)
        busy = neighbors.share()
    assert busy is not None
    assert 0.02 < busy <= 1


def test_own_work_is_not_a_neighbors() -> None:
    neighbors = Neighbors()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    own = neighbors.share()
    # Whatever else runs on this machine: one core's worth of it was this process.
    assert own is None or 0 <= own < 1
