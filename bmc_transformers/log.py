"""One log line per fact: what a user should know once, not at every step."""

from __future__ import annotations

import logging

logger = logging.getLogger("bmc_transformers")

_said: set[str] = set()


def say_once(message: str) -> None:
    """Logs a warning unless the very same one was logged before in this process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)
