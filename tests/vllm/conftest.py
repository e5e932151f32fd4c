"""Fixtures of the vLLM tests: the engine runs in the test's process, on tiny random models."""

import os

# Read by vLLM when it is imported, so before anything else.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Spinning OpenMP threads make tiny models crawl on a machine that is busy with anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import logging
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest

from tests.support import models


@pytest.fixture(scope="session", autouse=True)
def plugin_is_installed() -> None:
    names = [plugin.name for plugin in entry_points(group="vllm.platform_plugins")]
    assert "bmc" in names, "bmc-llm is not installed in this environment: pip install -e ."


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> models.ModelStore:
    """``model_dir("llama-gqa")`` gives the folder of that tiny model, made on first use."""
    return models.ModelStore(tmp_path_factory.mktemp("models"))


@pytest.fixture
def vllm_log() -> Iterator[list[str]]:
    """Messages that the logger "vllm" gets during the test."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    # The first engine of a process does so, and would take our handler away.
    configure_logging_if_needed(LoggingConfig())
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Handler()
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
