"""One log line per fact: what a user should know once, not at every step."""

from __future__ import annotations

import logging

_logged: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, message: str, level: int = logging.WARNING) -> None:
    """Logs `message` unless the very same one went to the same logger before in this process."""
    key = (logger.name, message)
    if key not in _logged:
        _logged.add(key)
        logger.log(level, message)


def forget() -> None:
    """Lets everything be logged again; for tests."""
    _logged.clear()
