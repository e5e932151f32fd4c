"""Where the end of a text stood before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmc_transformers.speculation.lookup import SuffixIndex


def indexed(tokens: list[int]) -> SuffixIndex:
    index = SuffixIndex()
    index.extend(tokens)
    return index


def by_search(tokens: list[int], longest: int) -> tuple[int, int]:
    """The same answer, without an index."""
    best = (0, 0)
    for place in range(len(tokens) - 1):
        length = 0
        while (
            length < min(longest, place + 1)
            and tokens[place - length] == tokens[len(tokens) - 1 - length]
        ):
            length += 1
        if length and length >= best[1]:
            best = (place + 1, length)
    return best


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6), st.integers(0, 40))
def test_longest_then_newest(tokens: list[int], longest: int, cut: int) -> None:
    index = indexed(tokens[:cut])
    index.extend(tokens[cut:])
    assert index.match(longest) == by_search(tokens, longest)


@pytest.mark.parametrize(
    ("tokens", "place", "following"),
    [
        ([5, 6, 7, 8, 5, 6], 2, [7, 8, 5, 6]),
        ([5, 6, 7, 5, 6, 9, 5, 6], 5, [9, 5, 6, 9]),  # the newest of two
        ([1, 5, 6, 7, 2, 5, 6, 9, 1, 5, 6], 3, [7, 2, 5, 6]),  # the longest of two
        ([4, 4, 4], 2, [4, 4, 4, 4]),  # it goes on with itself
    ],
)
def test_what_follows(tokens: list[int], place: int, following: list[int]) -> None:
    index = indexed(tokens)
    assert index.match()[0] == place
    assert index.following(place, 4) == following


def test_a_new_token_has_been_nowhere() -> None:
    assert indexed([1, 2, 3]).match() == (0, 0)
    assert indexed([]).match() == (0, 0)
