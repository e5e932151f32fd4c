"""Properties of the growth policies: never short, monotone, and how many growths they take."""

import math
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bmc_core.policy import DEFAULT_C, DEFAULT_R, MINIMUM_GROWTH, BMCPolicy

ROWS = st.integers(0, 5000)
POLICIES = st.one_of(
    st.integers(1, 600).map(lambda r: BMCPolicy(r=r)),
    st.integers(1, 600).map(lambda count: BMCPolicy(T=count)),
    st.tuples(st.floats(0.01, 50), st.integers(1, 64)).map(
        lambda pair: BMCPolicy.growing(c=pair[0], minimum=pair[1])
    ),
    st.just(BMCPolicy("auto")),
)


def grow_one_by_one(policy: BMCPolicy, rows: int, limit: int | None) -> list[int]:
    """The capacities in turn, from an empty cache, a row at a time."""
    held, capacities = 0, []
    for needed in range(1, rows + 1):
        now = policy.rows_to_hold(held, needed, limit)
        if now != held:
            capacities.append(now)
            held = now
    return capacities


@given(POLICIES, ROWS, ROWS, ROWS)
def test_never_short_never_less_never_above_the_limit(
    policy: BMCPolicy, held: int, needed: int, room: int
) -> None:
    limit = needed + room
    rows = policy.rows_to_hold(held, needed, limit)
    assert rows >= max(held, needed)
    assert rows <= max(held, limit)
    if needed <= held:
        assert rows == held


@given(POLICIES, ROWS, ROWS, ROWS, ROWS)
def test_more_needed_never_holds_less(
    policy: BMCPolicy, held: int, needed: int, more: int, room: int
) -> None:
    limit = needed + more + room
    first = policy.rows_to_hold(held, needed, limit)
    assert first <= policy.rows_to_hold(held, needed + more, limit)


@given(POLICIES, ROWS, ROWS)
def test_asking_again_changes_nothing(policy: BMCPolicy, held: int, needed: int) -> None:
    limit = 2 * (held + needed)
    rows = policy.rows_to_hold(held, needed, limit)
    assert policy.rows_to_hold(rows, needed, limit) == rows


@given(st.integers(1, 700), st.integers(1, 700))
def test_constant_r_takes_as_many_growths_as_the_model_says(r: int, rows: int) -> None:
    assert len(grow_one_by_one(BMCPolicy(r=r), rows, None)) == math.ceil(rows / r)
    assert len(grow_one_by_one(BMCPolicy(r=r), rows, rows)) == math.ceil(rows / r)


@given(st.integers(1, 700), st.integers(1, 700))
def test_t_growths_reach_the_limit(count: int, limit: int) -> None:
    capacities = grow_one_by_one(BMCPolicy(T=count), limit, limit)
    assert len(capacities) <= count
    assert capacities[-1] == limit
    r = math.ceil(limit / count)
    assert len(capacities) == math.ceil(limit / r)
    assert BMCPolicy(T=count).rows_per_growth(1, limit) == r


@given(st.floats(0.2, 20), st.integers(1, 3000))
def test_growing_takes_in_the_order_of_sqrt_n_growths(c: float, rows: int) -> None:
    policy = BMCPolicy.growing(c=c, minimum=1)
    growths = len(grow_one_by_one(policy, rows, None))
    # A growth at n adds at least c sqrt(n) - 1 beyond the row needed; summed up: 2 sqrt(N) / c.
    assert growths <= 2 * math.sqrt(rows) * max(1.0, 1.0 / c) + 2
    steps = [policy.rows_per_growth(n) for n in range(1, rows + 1)]
    assert steps == sorted(steps)


def test_both_ends_of_the_spectrum() -> None:
    assert grow_one_by_one(BMCPolicy.per_token(), 5, 5) == [1, 2, 3, 4, 5]
    assert grow_one_by_one(BMCPolicy.up_front(), 5, 9) == [9]
    assert BMCPolicy.per_token() == BMCPolicy(r=1)
    assert BMCPolicy.up_front() == BMCPolicy(T=1)


def test_integer_edges() -> None:
    assert BMCPolicy(r=7).rows_to_hold(0, 0) == 0
    assert BMCPolicy(r=7).rows_to_hold(0, 7) == 7
    assert BMCPolicy(r=7).rows_to_hold(0, 8) == 14
    assert BMCPolicy(r=7).rows_to_hold(3, 4, 4) == 4
    assert BMCPolicy(T=3).rows_to_hold(0, 1, 10) == 4
    assert BMCPolicy(T=100).rows_to_hold(0, 1, 10) == 1
    assert BMCPolicy(T=5).rows_to_hold(0, 0, 0) == 0
    huge = 10**15
    assert BMCPolicy(r=2).rows_to_hold(huge, huge + 1) == huge + 2
    assert BMCPolicy.growing(c=1.0, minimum=1).rows_to_hold(0, huge) >= huge
    assert BMCPolicy.growing(c=4.0).rows_to_hold(0, 1024) == 1023 + 128


def test_auto_is_growing_until_it_is_decided() -> None:
    auto, growing = BMCPolicy("auto"), BMCPolicy.growing()
    assert auto.is_auto
    assert not growing.is_auto
    assert auto != growing
    for needed in (1, 100, 10_000):
        assert auto.rows_to_hold(0, needed) == growing.rows_to_hold(0, needed)
    assert auto.rows_per_growth(1) == MINIMUM_GROWTH
    assert auto.rows_per_growth(10**6) == DEFAULT_C * 1000


def test_default_and_attributes() -> None:
    assert BMCPolicy().r == DEFAULT_R
    assert BMCPolicy(T=4).T == 4
    assert BMCPolicy(T=4).needs_limit
    for policy in (BMCPolicy(T=4), BMCPolicy("auto"), BMCPolicy.growing()):
        with pytest.raises(AttributeError, match="no constant r"):
            _ = policy.r
    with pytest.raises(AttributeError, match="no constant T"):
        _ = BMCPolicy(r=3).T


class Doubling:
    """A policy of the user's own."""

    def rows_to_hold(self, held: int, needed: int, limit: int | None = None) -> int:
        return max(needed, 2 * held)


def test_parse_takes_what_a_user_may_give() -> None:
    assert BMCPolicy.parse(7) == BMCPolicy(r=7)
    assert BMCPolicy.parse("auto") == BMCPolicy("auto")
    assert BMCPolicy.parse(None, T=3) == BMCPolicy(T=3)
    for policy in (BMCPolicy(T=3), Doubling()):
        assert BMCPolicy.parse(policy) is policy
        assert BMCPolicy.parse(None, unset=policy) is policy
        assert BMCPolicy.parse(7, unset=policy) == BMCPolicy(r=7)
        assert BMCPolicy.parse(None, T=9, unset=policy) == BMCPolicy(T=9)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-(10**30), ValueError),
        ("fast", ValueError),
        ("7", ValueError),
        ("", ValueError),
        (True, TypeError),
        (7.0, TypeError),
        (None, TypeError),
        (BMCPolicy, TypeError),  # the class, not one of its policies
        ([16], TypeError),
        (torch.zeros(2), TypeError),
    ],
    ids=repr,
)
def test_parse_names_setting_value_and_what_is_allowed(value: object, error: type) -> None:
    allowed = 'allowed are a BMCPolicy, an int r > 0 or "auto"'
    with pytest.raises(error, match=re.escape(f"settings['r']={value!r}: {allowed}")):
        BMCPolicy.parse(value, name="settings['r']")


@given(POLICIES)
def test_equal_to_its_copies(policy: BMCPolicy) -> None:
    twin = pickle.loads(pickle.dumps(policy))
    assert twin == policy
    assert hash(twin) == hash(policy)
    assert repr(twin) == repr(policy)
    assert policy != BMCPolicy(r=10_001)
    assert policy != 3


@given(st.integers(1, 300), st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 3000))
def test_constant_r_holds_whole_growths(r: int, held: int, needed: int, room: int) -> None:
    rows = BMCPolicy(r).rows_to_hold(held, needed)
    assert rows >= max(held, needed)
    assert (rows - held) % r == 0
    assert rows == held or rows - r < needed
    assert BMCPolicy(r).rows_to_hold(held, needed, needed + room) in (
        held if needed <= held else min(rows, needed + room),
    )


def test_wrong_row_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"r=0.*positive"):
        BMCPolicy(0)
    with pytest.raises(TypeError, match=r"r=1\.5"):
        BMCPolicy(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit=5"):
        BMCPolicy(16).rows_to_hold(0, 6, 5)
    with pytest.raises(ValueError, match="held=-1"):
        BMCPolicy(16).rows_to_hold(-1, 6)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: BMCPolicy(r=0), ValueError, "r=0: expected a positive int"),
        (lambda: BMCPolicy(T=-1), ValueError, "T=-1: expected a positive int"),
        (lambda: BMCPolicy(T=True), TypeError, "T=True"),
        (lambda: BMCPolicy(r=2.0), TypeError, r"r=2\.0"),
        (lambda: BMCPolicy(r=2, T=3), ValueError, "r=2 and T=3: expected one"),
        (lambda: BMCPolicy("auto", T=3), ValueError, 'r="auto" and T=3'),
        (lambda: BMCPolicy("many"), ValueError, "r='many': expected .*\"auto\""),
        (lambda: BMCPolicy.parse(8, name="r", T=3), ValueError, "r=8 and T=3 .*; allowed: one of"),
        (lambda: BMCPolicy.parse("auto", T=3), ValueError, "policy='auto' and T=3 are both"),
        (lambda: BMCPolicy.parse(None, T=0), ValueError, "T=0: expected a positive int"),
        (lambda: BMCPolicy.growing(c=0), ValueError, "c=0: expected a positive number"),
        (lambda: BMCPolicy.growing(c=float("nan")), ValueError, "c=nan"),
        (lambda: BMCPolicy.growing(c="4"), TypeError, "c='4'"),
        (lambda: BMCPolicy.growing(minimum=0), ValueError, "minimum=0"),
        (lambda: BMCPolicy.up_front().rows_to_hold(0, 1), ValueError, "needs limit.*limit=None"),
        (lambda: BMCPolicy("auto").rows_to_hold(0, -1), ValueError, "needed=-1"),
    ],
)
def test_refusals_name_the_setting(build, error, message: str) -> None:
    with pytest.raises(error, match=message):
        build()
