"""Draft tokens that are copied from the request's own text."""

import numpy as np
import pytest

from bmc_vllm.drafters.lookup import draft_tokens


@pytest.mark.parametrize(
    ("tokens", "count", "least", "most", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 3, 2, 2, [3, 4, 5]),
        ([1, 2, 3, 4, 5, 1, 2], 3, 3, 3, []),
        ([1, 2, 3, 4, 5, 1, 2], 3, 1, 3, [3, 4, 5]),
        # The latest of two occurrences, and the longest match before a later, shorter one.
        ([7, 1, 8, 7, 1, 9, 7, 1], 2, 2, 2, [9, 7]),
        ([5, 7, 1, 8, 6, 1, 9, 5, 7, 1], 1, 1, 3, [8]),
        # A text that repeats itself goes on.
        ([1, 2, 1, 2], 5, 2, 2, [1, 2, 1, 2, 1]),
        ([4, 4, 4], 3, 2, 3, [4, 4, 4]),
        ([1, 2, 3], 3, 1, 3, []),
        ([1, 2], 3, 2, 2, []),
        ([1], 3, 1, 1, []),
        ([1, 1], 0, 1, 1, []),
    ],
)
def test_copies_what_followed(
    tokens: list[int], count: int, least: int, most: int, expected: list[int]
) -> None:
    assert draft_tokens(np.array(tokens, dtype=np.int32), count, least, most) == expected


def test_agrees_with_a_plain_search() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        tokens = generator.integers(0, 4, generator.integers(1, 30)).astype(np.int32)
        text, least, most = tokens.tolist(), 2, 4
        expected: list[int] = []
        for size in range(most, least - 1, -1):
            ends = [end for end in range(size, len(text)) if text[end - size : end] == text[-size:]]
            if len(text) > size and ends:
                end = ends[-1]
                copied = list(text)
                for place in range(5):
                    copied.append(copied[end + place])
                expected = copied[len(text) :]
                break
        assert draft_tokens(tokens, 5, least, most) == expected
