"""Who else uses the cores."""

import os
import subprocess
import sys
import time

import pytest

from bmc_core.machine import load
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
    assert busy * (os.cpu_count() or 1) > 0.04, "a good part of one core"
    assert busy <= 1


def test_own_work_is_not_a_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 busy seconds in 2 seconds of four cores, 4 were this process's."""
    times = iter([(100.0, 10.0, 50.0), (106.0, 14.0, 52.0)])
    monkeypatch.setattr(Neighbors, "_now", staticmethod(lambda: next(times)))
    monkeypatch.setattr(load.os, "cpu_count", lambda: 4)
    assert Neighbors().share() == pytest.approx(2 / 8)
