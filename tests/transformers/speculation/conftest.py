"""Measurements of tiny models, which need not be good ones, take next to no time."""

import pytest

from bmc_transformers.speculation import settings


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SECONDS", 0.02)
