"""Rows that a draft model missed are found, whatever was parked, preempted, shared, used again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmc_vllm.drafters.catch_up import parts
from bmc_vllm.drafters.rows import DraftRows, Span, StepRows

SIZE = 4


def step(*requests: tuple[str, int, int, list[int]]) -> StepRows:
    """(id, first row, rows, block table) each."""
    width = max(len(table) for *_, table in requests)
    return StepRows(
        [request_id for request_id, *_ in requests],
        np.array([first for _, first, *_ in requests]),
        np.array([count for *_, count, _ in requests]),
        np.array([table + [0] * (width - len(table)) for *_, table in requests]),
    )


def test_what_runs_always_misses_nothing() -> None:
    rows = DraftRows(SIZE)
    for first, count in ((0, 6), (6, 1), (7, 3), (8, 1)):
        now = step(("a", first, count, [1, 2, 3]))
        assert rows.spans(now) == []
        rows.computed(now)


def test_parked_rows_are_missing_until_computed() -> None:
    rows = DraftRows(SIZE)
    rows.computed(step(("a", 0, 5, [1, 2, 3]), ("b", 0, 3, [4, 5])))
    for first in (5, 6, 7):
        rows.missed(step(("a", first, 1, [1, 2, 3])))
    now = step(("a", 8, 1, [1, 2, 3]), ("b", 3, 1, [4, 5]))
    assert rows.spans(now) == [Span(0, 5, 8)]
    rows.computed(now)
    assert rows.spans(step(("a", 9, 1, [1, 2, 3]))) == []


def test_rejected_draft_tokens_are_no_missed_rows() -> None:
    """A parked step that still verifies four draft tokens, of which one is accepted."""
    rows = DraftRows(SIZE)
    rows.computed(step(("a", 0, 5, [1, 2, 3])))
    rows.missed(step(("a", 5, 5, [1, 2, 3])))
    assert rows.spans(step(("a", 7, 1, [1, 2, 3]))) == [Span(0, 5, 7)]


def test_a_prefix_with_holes_is_computed_from_the_first() -> None:
    rows = DraftRows(SIZE)
    rows.computed(step(("a", 0, 5, [1, 2])))
    for first in range(5, 12):
        rows.missed(step(("a", first, 1, [1, 2, 3])))
    rows.forget(["a"])
    hit = step(("b", 12, 2, [1, 2, 3, 9]))
    assert rows.spans(hit) == [Span(0, 4, 12)]
    rows.computed(hit)
    assert rows.spans(step(("c", 12, 2, [1, 2, 3, 8]))) == [], "the repair counts for all"


def test_a_block_that_is_used_again_has_no_holes() -> None:
    rows = DraftRows(SIZE)
    rows.missed(step(("a", 0, 4, [1])))
    rows.forget(["a"])
    rows.computed(step(("b", 0, 6, [1, 2])))
    rows.forget(["b"])
    assert rows.spans(step(("c", 4, 2, [1, 3]))) == []


def test_a_resumed_request_is_a_new_one() -> None:
    rows = DraftRows(SIZE)
    rows.computed(step(("a", 0, 6, [1, 2])))
    rows.missed(step(("a", 6, 1, [1, 2])))
    rows.forget(["a"])
    assert rows.spans(step(("a", 0, 7, [3, 4]))) == []


REQUESTS = st.integers(0, 3)
ACTIONS = ["runs", "parks", "ends", "joins"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(REQUESTS, st.sampled_from(ACTIONS)), max_size=40))
def test_after_a_draft_every_row_is_there(actions: list[tuple[int, str]]) -> None:
    """Against a pool in which each row remembers whether the draft model wrote it for this text:
    requests grow, end, and take over the full blocks of one that ended."""
    rows = DraftRows(SIZE)
    tables: dict[int, list[int]] = {}
    lengths: dict[int, int] = {}
    written: set[tuple[int, int]] = set()
    cached: list[int] = []
    fresh = iter(range(1, 1000))
    for request, action in actions:
        if action == "ends":
            if request in tables:
                cached = tables.pop(request)[: lengths.pop(request) // SIZE]
                rows.forget([str(request)])
            continue
        if request not in tables:
            shared = list(cached) if action == "joins" else []
            tables[request], lengths[request] = shared, len(shared) * SIZE
        first = lengths[request]
        count = 1 if first % 3 else 2
        while len(tables[request]) * SIZE < first + count:
            tables[request].append(next(fresh))
        now = step((str(request), first, count, tables[request]))

        def places(start: int, end: int, table: list[int]) -> set[tuple[int, int]]:
            return {(table[row // SIZE], row % SIZE) for row in range(start, end)}

        if action == "parks":
            rows.missed(now)
        else:
            for _, start, end in rows.spans(now):
                written |= places(start, end, tables[request])
            rows.computed(now)
            written |= places(first, first + count, tables[request])
            assert places(0, first + count, tables[request]) <= written
        lengths[request] = first + count


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_spans_are_cut_to_the_size_of_a_pass(most: int) -> None:
    spans = [Span(0, 2, 9), Span(2, 0, 1), Span(3, 5, 10)]
    found = list(parts(spans, most))
    assert all(sum(end - start for _, start, end in part) <= most for part in found)
    rows = [
        (index, row) for part in found for index, start, end in part for row in range(start, end)
    ]
    assert rows == [(index, row) for index, start, end in spans for row in range(start, end)]
