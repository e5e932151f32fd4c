"""A fact is logged once for each logger."""

import logging

import pytest

from bmc_core.log import forget, log_once


def test_once_for_each_logger_and_message(caplog: pytest.LogCaptureFixture) -> None:
    one, other = logging.getLogger("one"), logging.getLogger("other")
    for logger in (one, one, other, one):
        log_once(logger, "a fact of 100 %")
    log_once(one, "another fact")
    said = [(record.name, record.getMessage()) for record in caplog.records]
    assert said == [
        ("one", "a fact of 100 %"),
        ("other", "a fact of 100 %"),
        ("one", "another fact"),
    ]
    forget()
    log_once(one, "another fact")
    assert len(caplog.records) == 4
