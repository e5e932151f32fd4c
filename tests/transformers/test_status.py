"""What `python -m bmc_core info` says of transformers."""

from __future__ import annotations

import pytest
import transformers

from bmc_transformers import status


def test_the_installed_version_is_one_that_the_tests_run_with() -> None:
    found = status.status()
    assert found.version == transformers.__version__
    assert found.tested == status.TESTED_TRANSFORMERS


@pytest.mark.parametrize(
    ("installed", "said"),
    [("5.19.3", "5.19.3"), ("5.24.0", "5.24.0 (not tested)"), ("5.18.0", "5.18.0 (not tested)")],
)
def test_another_version_is_said_to_be_untested(
    installed: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "version", lambda name: installed)
    assert status.status().version == said
