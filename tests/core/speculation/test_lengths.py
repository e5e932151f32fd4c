"""The choice of a set of draft tokens against every set there is."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmc_core.speculation import Choice, StepCosts, choose_lengths
from bmc_core.speculation.costs import at

SECONDS = st.floats(1e-4, 1.0)


@st.composite
def rising(draw, points: int, *, convex: bool = False) -> tuple[tuple[int, float], ...]:
    xs = sorted({1, *draw(st.sets(st.integers(2, 20), max_size=points - 1))})
    steps = [draw(st.floats(0.0, 0.2)) for _ in xs]
    if convex:
        slopes, level, curve = sorted(steps), draw(SECONDS), []
        for index, x in enumerate(xs):
            level += slopes[index] * (x - xs[index - 1]) if index else 0.0
            curve.append((x, level))
        return tuple(curve)
    return tuple(zip(xs, itertools.accumulate(steps, initial=draw(SECONDS)), strict=False))


@st.composite
def cases(draw, *, convex: bool):
    requests = draw(st.integers(1, 4))
    survival = [
        list(itertools.accumulate(draw(st.lists(st.floats(0, 1), max_size=4)), lambda a, b: a * b))
        for _ in range(requests)
    ]
    contexts = [draw(st.integers(0, 50)) for _ in range(requests)]
    limits = [draw(st.integers(0, 4)) for _ in range(requests)]
    attention = draw(rising(4, convex=convex))
    costs = StepCosts(
        forward=draw(rising(5)),
        attention=tuple((x, y / 50) for x, y in attention),
        draft=draw(st.one_of(st.just(()), rising(2))),
        draft_attention=draw(st.one_of(st.just(()), st.just(((1, 1e-4), (3, 2e-4))))),
        sampler=draw(st.one_of(st.just(()), rising(2))),
        draft_overhead=draw(st.floats(0, 0.1)),
    )
    return survival, contexts, limits, costs


def seconds_of(lengths, contexts, costs, draft_steps) -> float:
    """The price of a step, from the words of `StepCosts`."""
    rows = sum(lengths) + len(lengths)
    seconds = at(costs.forward, rows) + at(costs.sampler, rows)
    seconds += sum(c * at(costs.attention, k + 1) for k, c in zip(lengths, contexts, strict=True))
    if not draft_steps:
        return seconds
    pass_of_one = at(costs.draft_attention, 1)
    attention = at(costs.draft_attention, draft_steps + 1) + (draft_steps - 1) * pass_of_one
    drafting = costs.draft_overhead + draft_steps * at(costs.draft, len(lengths))
    return seconds + drafting + sum(contexts) * attention


def best_of_all(survival, contexts, limits, costs, draft_steps) -> float:
    most = [min(len(s), limit) for s, limit in zip(survival, limits, strict=True)]
    if draft_steps is not None:
        most = [min(n, draft_steps) for n in most]
    free = not costs.draft and draft_steps is None
    best = 0.0
    for lengths in itertools.product(*(range(n + 1) for n in most)):
        tokens = len(lengths) + sum(sum(s[:k]) for s, k in zip(survival, lengths, strict=True))
        steps = 0 if free else max(lengths) if draft_steps is None else draft_steps
        best = max(best, tokens / seconds_of(lengths, contexts, costs, steps))
    return best


@given(cases(convex=True), st.one_of(st.none(), st.integers(0, 4)))
@settings(max_examples=100, deadline=None)
def test_the_best_of_all_sets(case, draft_steps) -> None:
    choice = choose_lengths(*case, draft_steps=draft_steps)
    assert choice.rate == pytest.approx(best_of_all(*case, draft_steps), rel=1e-6)


@given(cases(convex=False))
@settings(max_examples=100, deadline=None)
def test_close_to_it_where_attention_is_measured_unevenly(case) -> None:
    choice = choose_lengths(*case, draft_steps=None)
    assert choice.rate >= best_of_all(*case, None) * 0.97


@given(cases(convex=False), st.one_of(st.none(), st.integers(0, 4)))
@settings(max_examples=50, deadline=None)
def test_a_choice_is_what_it_says(case, draft_steps) -> None:
    survival, contexts, limits, costs = case
    choice = choose_lengths(*case, draft_steps=draft_steps)
    assert all(
        0 <= k <= min(limit, len(s), 4 if draft_steps is None else draft_steps)
        for k, limit, s in zip(choice.lengths, limits, survival, strict=True)
    )
    free = not costs.draft and draft_steps is None
    steps = 0 if free else choice.draft_steps
    assert choice.draft_steps == (
        draft_steps if draft_steps is not None else 0 if free else max(choice.lengths)
    )
    tokens = sum(1 + sum(s[:k]) for s, k in zip(survival, choice.lengths, strict=True))
    assert choice.tokens == pytest.approx(tokens)
    assert choice.seconds == pytest.approx(seconds_of(choice.lengths, contexts, costs, steps))


FLAT = StepCosts(((1, 1.0), (64, 1.0)), ((1, 0.0),), ())


def test_free_rows_take_all_that_can_be_right() -> None:
    assert choose_lengths([[0.9, 0.5, 0.01]], [10], [8], FLAT, draft_steps=None).lengths == (3,)


def test_of_equal_sets_the_shorter_wins() -> None:
    assert choose_lengths([[0.5, 0.0, 0.0]], [10], [8], FLAT, draft_steps=None).lengths == (1,)
    even = StepCosts(((1, 1.0), (2, 2.0)), ((1, 0.0),), ())
    assert choose_lengths([[1.0, 1.0]], [10], [8], even, draft_steps=None).lengths == (0,)


def test_rows_go_to_the_requests_that_use_them() -> None:
    costs = StepCosts(((1, 1.0), (4, 1.0), (8, 1.6)), ((1, 0.0),), ())
    survival = [[0.9, 0.85, 0.8, 0.75], [0.1, 0.01, 0.0, 0.0]]
    assert choose_lengths(survival, [10, 10], [4, 4], costs, draft_steps=None).lengths == (4, 0)


def test_grouped_queries_over_a_long_context_shorten_drafts() -> None:
    costs = StepCosts(((1, 1.0), (64, 1.0)), ((1, 1e-4), (5, 2.4e-4), (9, 4e-4)), ())
    survival = [[0.7**i for i in range(1, 9)]]
    short, long = (
        choose_lengths(survival, [context], [8], costs, draft_steps=None).lengths[0]
        for context in (100, 50_000)
    )
    assert short > long


def test_the_draft_model_is_paid_by_all_who_wait_for_it() -> None:
    costs = StepCosts(((1, 1.0), (64, 1.0)), ((1, 0.0),), ((1, 0.4), (64, 0.4)))
    copier, other = [0.9, 0.8], [0.0, 0.0]
    assert choose_lengths([copier], [1], [2], costs, draft_steps=None).draft_steps > 0
    many = choose_lengths([copier, *[other] * 7], [1] * 8, [2] * 8, costs, draft_steps=None)
    assert many == Choice((0,) * 8, 0, 8.0, 1.0)
    paid = choose_lengths([copier, *[other] * 7], [1] * 8, [2] * 8, costs, draft_steps=2)
    assert paid.lengths == (2, *(0,) * 7), "their drafting is paid, their rows are free"


def test_nothing_costs_nothing() -> None:
    assert choose_lengths([], [], [], FLAT, draft_steps=None) == Choice((), 0, 0.0, 0.0)
    free = StepCosts(((1, 0.0),), ((1, 0.0),), ())
    assert choose_lengths([[0.5]], [0], [1], free, draft_steps=None).rate == math.inf
