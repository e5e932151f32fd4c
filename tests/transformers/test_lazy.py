"""Tensors that are computed only if somebody looks."""

from __future__ import annotations

import pytest

from tests.support.caches import filled, rows


def test_k_and_v_of_an_earlier_step_are_refused_not_wrong() -> None:
    cache = filled("packed")
    key, _ = cache.update(rows(2, 1), rows(2, 1), 1)
    cache.update(rows(2, 1), rows(2, 1), 1)
    with pytest.raises(RuntimeError, match="of an earlier step"):
        key.sum()
