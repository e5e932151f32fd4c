"""Fixtures of the real-server tests: a quickly trained demo model, made once per run."""

from pathlib import Path

import pytest

from tools.demo import model as demo_model


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder (for XDG_CACHE_HOME) that holds a demo model of a few seconds' training.

    Trained, however little: an untrained model's logits are so close together that the last
    bit of a float32 sum could decide a token.
    """
    cache = tmp_path_factory.mktemp("cache")
    demo_model.ensure(cache / "bmc-llm" / f"demo-{demo_model.VERSION}", seconds=20)
    return cache


@pytest.fixture(scope="session")
def demo_target(demo_cache: Path) -> Path:
    return demo_cache / "bmc-llm" / f"demo-{demo_model.VERSION}" / "target"
