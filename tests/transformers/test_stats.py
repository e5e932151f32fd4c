"""What a cache counts, as numbers and as a table."""

from __future__ import annotations

import re

from tests.support.caches import HEADS, SIZE, filled, rows


def test_stats_count_and_print() -> None:
    cache = filled("rows", 30, window=64)
    for layer in range(2):
        cache.update(rows(2, 3), rows(2, 3), layer)
    stats = cache.stats()
    row = 2 * 2 * HEADS * SIZE * 4
    assert (stats.tokens, stats.layouts, stats.growths) == (33, {"rows": 2}, 4)
    assert (stats.rows_held, stats.rows_reserved, stats.rows_spare) == (66, 96, 30)
    assert (stats.copies, stats.rows_copied, stats.bytes_copied) == (2, 60, 60 * row)
    assert (stats.bytes_allocated, stats.bytes_reserved) == (160 * row, 96 * row)
    # One layer's new K, old V and new V beside the other layer: K's old memory is gone by then.
    assert stats.bytes_peak == 48 * row + (48 + 32 + 48) * row // 2
    assert "growths          4\n" in str(stats)
    assert re.search(r"reserved +0\.09 MiB", str(stats))
