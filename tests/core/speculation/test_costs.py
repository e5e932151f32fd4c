"""Curves of a step's costs, their way through JSON, and what the clock makes of them."""

import json
import random

import pytest

from bmc_core.speculation import StepCosts
from bmc_core.speculation.correction import CostCorrection
from bmc_core.speculation.costs import CostTables, at
from tests.support.speculation import COSTS


def test_curves_go_on_beyond_their_points() -> None:
    curve = ((2, 1.0), (4, 2.0), (8, 2.0))
    assert [at(curve, x) for x in (1, 2, 3, 4, 6, 8, 100)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert at(((2, 0.1), (4, 2.0)), 1) == 0.0, "never negative"
    assert at(((3, 0.7),), 50) == 0.7
    assert at((), 3) == 0.0


def test_costs_go_through_json() -> None:
    assert StepCosts.from_dict(json.loads(json.dumps(COSTS.to_dict()))) == COSTS
    least = StepCosts(((1, 1.0),), ((1, 0.0),), ())
    assert StepCosts.from_dict({"forward": [[1, 1]], "attention": [[1, 0]], "draft": []}) == least


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward": []}, "forward=\\(\\): expected at least one point"),
        ({"forward": [[1, -1.0]]}, "forward=.*: expected finite points with seconds >= 0"),
        ({"attention": [[1, float("nan")]]}, "attention=.*: expected finite points"),
        ({"draft": [[4, 1.0], [2, 1.0]]}, "draft=.*: expected rising x"),
        ({"draft_overhead": -1.0}, "draft_overhead=-1.0: expected seconds >= 0"),
        ({"verify": []}, "verify: expected one of attention, draft, "),
    ],
)
def test_bad_costs_are_named(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        StepCosts.from_dict({**COSTS.to_dict(), **change})


def test_a_missing_curve_is_named() -> None:
    with pytest.raises(ValueError, match="attention is missing"):
        StepCosts.from_dict({"forward": [[1, 1.0]], "draft": []})


def test_tables_are_the_curves() -> None:
    tables = CostTables(COSTS, 4)
    assert tables.reserve(40)
    assert not tables.reserve(40)
    assert tables.rows[:41] == pytest.approx([at(COSTS.forward, n) for n in range(41)])
    rounds = tables.drafting(2, 3000)
    assert rounds[0] == 0.0
    first, later = at(COSTS.draft_attention, 4), at(COSTS.draft_attention, 1)
    expected = 0.3e-3 + 3 * at(COSTS.draft, 2) + 3000 * (first + 2 * later)
    assert rounds[3] == pytest.approx(expected)
    assert tables.catching_up(0) == 0.0
    assert 0 < tables.catching_up(20) < tables.catching_up(200)


def correction(samples) -> CostCorrection:
    result = CostCorrection()
    for rows, ratio in samples:
        result.forward(rows, ratio, 1.0)
    return result


def test_costs_that_were_wrong_by_two_are_put_right() -> None:
    assert correction([(5, 2.0)] * 5).factors(64) == pytest.approx(2.0)


def test_the_form_of_the_curve_is_learned() -> None:
    """Sixteen rows cost half as much again as was said, one row what was said."""
    factors = correction([(1, 1.0), (16, 1.5), (1, 1.0)] * 40).factors(64)
    assert factors[16] / factors[1] == pytest.approx(1.5, rel=0.08)
    assert factors[1] < factors[4] < factors[16] == factors[40]


def test_a_slower_machine_is_no_other_curve() -> None:
    before = [(1, 1.0), (5, 1.2), (1, 1.0)] * 30
    factors = correction([*before, *[(5, 2.4)] * 20]).factors(8)
    assert factors[5] / factors[1] == pytest.approx(1.2, rel=0.1)
    assert factors[1] == pytest.approx(2.0, rel=0.1)


def test_stalls_and_noise_change_little() -> None:
    chance = random.Random(1)
    noisy = [
        (rows, chance.gauss(1.0, 0.1) * (10.0 if chance.random() < 0.1 else 1.0))
        for rows in [1, 5, 9] * 60
    ]
    assert correction(noisy).factors(16)[1:10] == pytest.approx(1.0, abs=0.12)


def test_one_bad_sample_is_not_kept_for_good() -> None:
    """Were it kept, drafts of this length would never be tried again."""
    once = correction([*[(1, 1.0)] * 9, *[(9, 4.0)] * 3])
    assert once.factors(16)[9] > 1.5
    for _ in range(2000):
        once.forward(1, 1.0, 1.0)
    assert once.factors(16)[9] == pytest.approx(1.0)


@pytest.mark.parametrize("measured", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clock_that_says_nonsense_is_not_heeded(measured) -> None:
    result = CostCorrection()
    result.forward(1, measured, 1.0)
    result.drafting(measured, 1.0)
    result.sampling(measured, 1.0)
    assert result.factors(4).tolist() == [1.0] * 4
    assert (result.draft_factor, result.sampling_factor) == (1.0, 1.0)
