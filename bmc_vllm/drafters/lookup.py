"""Draft tokens from the request's own text: what followed an earlier occurrence of its end.

Promises arrays only: no vLLM, and no numba, which vLLM's n-gram proposer brings along.
"""

from __future__ import annotations

import numpy as np


def draft_tokens(tokens: np.ndarray, count: int, least: int, most: int) -> list[int]:
    """Looks for the longest end of `tokens` that occurred before, and copies what followed.

    Of several occurrences the latest counts. Where the text ends before `count` tokens are copied,
    the copy goes on with itself, as for a text that repeats itself.

    Args:
        tokens: int `[any]`, prompt and output.
        count: draft tokens wanted.
        least, most: tokens that must match, and that are compared at most.

    Returns:
        `count` tokens; none where fewer than `least` tokens match.
    """
    length = len(tokens)
    if count <= 0 or length <= least:
        return []
    ends = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1
    matched, size = ends, 1
    while len(ends) and size < most:
        ends = ends[ends > size]
        ends = ends[tokens[ends - size - 1] == tokens[length - size - 1]]
        if len(ends):
            matched, size = ends, size + 1
    if not len(matched) or size < least:
        return []
    end = int(matched[-1])
    return np.resize(tokens[end : end + count], count).tolist()
