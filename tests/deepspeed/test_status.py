"""What `python -m bmc_core info` says of DeepSpeed."""

from __future__ import annotations

import deepspeed
import pytest

from bmc_deepspeed.hooks import TESTED_DEEPSPEED
from bmc_deepspeed.status import status


def test_the_installed_version_takes_kv_policy() -> None:
    assert status() == (deepspeed.__version__, TESTED_DEEPSPEED, None)


def test_another_version_is_said_to_be_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.18.1")
    reason = status().steps_aside
    assert reason == f"DeepSpeed 0.18.1 is outside the tested range {TESTED_DEEPSPEED}"
