"""One layer: what a window drops, and how far a crop may go back."""

from __future__ import annotations

import pytest
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from bmc_transformers import BMCCache
from tests.support.caches import config, filled, rows


def test_a_window_that_is_gone_cannot_be_cropped_into(layout: str) -> None:
    cache = BMCCache(config(layout, 4), 1)
    for _ in range(80):
        for layer in range(2):
            cache.update(rows(1, 1), rows(1, 1), layer)
    with pytest.raises(RuntimeError, match="crop to 10 tokens: the window of 4 rows"):
        cache.crop(-70)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [80, 80]
    assert cache.layers[0].store.capacity <= 32


def test_the_older_meaning_of_crop(layout: str) -> None:
    cache = filled(layout, 8)
    cache.crop(5)
    assert cache.get_seq_length() == 5
    cache.crop(7)
    assert cache.get_seq_length() == 5


def test_stock_sliding_layer_is_what_we_compare_with() -> None:
    assert type(DynamicCache(config=config()).layers[0]) is DynamicSlidingWindowLayer
