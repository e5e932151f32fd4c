"""Survival of draft tokens from what was accepted: censored, fading, shared."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmc_core.speculation.acceptance import START, Acceptance

POSITIONS = 8


def learned(*observations, positions: int = POSITIONS) -> Acceptance:
    """(request, proposed, accepted) in turn, learned one by one."""
    acceptance = Acceptance(positions)
    for request, proposed, accepted in observations:
        acceptance.slot(request, "")
        acceptance.observe(request, proposed, accepted, "")
        acceptance.learn()
    return acceptance


def survival(acceptance: Acceptance, request: object = "a", drafter: str = "") -> list[float]:
    return acceptance.survival(np.array([acceptance.slot(request, drafter)[0]]))[0].tolist()


def draws(acceptance: float, steps: int, k: int, request: str = "a", seed: int = 0):
    chance = random.Random(seed)
    for _ in range(steps):
        accepted = 0
        while accepted < k and chance.random() < acceptance:
            accepted += 1
        yield request, k, accepted


def test_a_new_drafter_is_hoped_of() -> None:
    expected = [START ** (i + 1) for i in range(POSITIONS)]
    assert survival(learned()) == pytest.approx(expected)


@pytest.mark.parametrize("true", [0.2, 0.5, 0.8, 0.95])
def test_censored_data_give_the_acceptance(true) -> None:
    """A step that accepted all of its drafts says nothing of the next position."""
    found = survival(learned(*draws(true, 200, 3)))
    assert found[0] == pytest.approx(true, abs=0.12)
    assert found[2] == pytest.approx(true**3, abs=0.15)


def test_positions_never_tried_follow_those_before() -> None:
    copies, fails = (survival(learned(*[("a", 4, right)] * 30)) for right in (4, 0))
    assert copies[7] > 0.6
    assert fails[0] < 0.1


def test_of_one_drafter_some_copy_and_some_do_not() -> None:
    """Two humps: the one goes to the longest drafts, the other to none."""
    acceptance = Acceptance(16)
    for request in ("copier", "other"):
        acceptance.slot(request, "")
    for _ in range(25):
        acceptance.observe("copier", 4, 4, "")
        acceptance.observe("other", 2, 0, "")
        acceptance.learn()
    assert survival(acceptance, "copier")[15] > 0.5
    assert survival(acceptance, "other")[0] < 0.15


def test_newcomers_do_not_pay_for_learning() -> None:
    acceptance = learned(*[(f"r{i}", 4, 0) for i in range(20)])
    assert survival(acceptance, "new")[0] < 0.1
    acceptance = learned(*[(f"r{i}", 4, 4) for i in range(20)])
    assert survival(acceptance, "new")[3] > 0.7


def test_drafters_do_not_share() -> None:
    acceptance = Acceptance(POSITIONS)
    for drafter, accepted in (("ngram", 4), ("draft", 0)):
        for i in range(10):
            acceptance.slot(i, drafter)
            acceptance.observe(i, 4, accepted, drafter)
    acceptance.learn()
    assert survival(acceptance, "new", "ngram")[0] > 0.8
    assert survival(acceptance, "new", "draft")[0] < 0.2
    assert survival(acceptance, 3, "ngram")[0] > survival(acceptance, 3, "draft")[0] + 0.6


def test_old_observations_fade() -> None:
    changed = learned(*draws(0.9, 200, 4), *draws(0.2, 40, 4, seed=1))
    assert survival(changed)[0] < 0.5


def test_a_cap_makes_the_past_unsure() -> None:
    acceptance = learned(*[("a", 2, 0)] * 50)
    sure = survival(acceptance)[0]
    acceptance.cap(np.array([0]), 3.0)
    acceptance.cap_drafters(3.0)
    acceptance.observe("a", 2, 2, "")
    acceptance.observe("a", 2, 2, "")
    acceptance.learn()
    assert sure < 0.05
    assert survival(acceptance)[0] > 0.3


def test_one_lot_of_observations_is_worth_as_much_as_one_by_one() -> None:
    one_by_one = learned(*draws(0.7, 10, 4))
    at_once = Acceptance(POSITIONS)
    at_once.slot("a", "")
    for request, proposed, accepted in draws(0.7, 10, 4):
        at_once.observe(request, proposed, accepted, "")
    assert at_once.learn().tolist() == [0]
    assert survival(at_once) == pytest.approx(survival(one_by_one), abs=0.03)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 8), st.integers(0, 8)).map(
            lambda t: (t[0], t[1], min(t[1], t[2]))
        ),
        max_size=60,
    )
)
def test_survival_is_a_probability_that_falls(observations) -> None:
    acceptance = learned(*observations)
    for request in range(4):
        found = survival(acceptance, request)
        assert all(0.0 < b <= a < 1.0 for a, b in itertools.pairwise(found))


def test_what_is_learned_from_is_known_by_any_name() -> None:
    """A caller that does not name the drafter when it observes is understood."""
    acceptance = Acceptance(POSITIONS)
    slot, new = acceptance.slot("a", "ngram")
    assert new
    acceptance.observe("a", 2, 2, "")
    acceptance.observe("unknown", 2, 0, "")
    assert acceptance.learn().tolist() == [slot]


def test_many_come_and_go() -> None:
    acceptance = Acceptance(POSITIONS)
    for i in range(5000):
        _, new = acceptance.slot(i, "")
        assert new
        acceptance.observe(i, 2, 2, "")
        if i >= 10:
            acceptance.forget(i - 10)
        if i % 3 == 0:
            acceptance.learn()
    assert acceptance.slots < 32
    acceptance.forget("never seen")


def test_a_slot_is_not_inherited() -> None:
    """What the last one showed in it is gone, also what was still pending when it ended."""
    acceptance = learned(*[(f"r{i}", 4, 4) for i in range(20)], *[("bad", 4, 0)] * 20)
    acceptance.observe("bad", 4, 0, "")
    acceptance.forget("bad")
    acceptance.learn()
    assert survival(acceptance, "a") == survival(acceptance, "b")
