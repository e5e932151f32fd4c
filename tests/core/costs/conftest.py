"""No test of costs sees the figures of this machine, or leaves any."""

from pathlib import Path

import pytest

from bmc_core.costs import calibration
from bmc_core.costs.geometry import Geometry
from bmc_core.costs.measure import Measured
from tests.support.figures import FIGURES


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder and a process memory of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_known", {})
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Geometry]:
    """Known figures instead of a measurement; a list of what was asked for."""
    asked: list[Geometry] = []

    def known(geometry: Geometry, *, seconds: float, progress=None) -> Measured:
        asked.append(geometry)
        return FIGURES

    monkeypatch.setattr(calibration, "measure", known)
    return asked
