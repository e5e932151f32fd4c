"""What steering is worth: tokens per second of simulated serving against the best fixed k.

Every policy meets the same draws, see `tests.support.speculation`. Seconds are the simulation's, so
these tests say the same on every machine.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from bmc_core.speculation import SpeculationController, StepCosts
from tests.support.speculation import (
    COSTS,
    FREE,
    Fixed,
    Served,
    Stream,
    best_fixed,
    serve,
)

MOST = 8


def controller(costs: StepCosts | None = COSTS, most: int = MOST) -> SpeculationController:
    return SpeculationController(costs, max_draft_tokens=most)


def streams(
    acceptance: float | Callable[[int], float], count: int, tokens: int = 500, context: int = 1000
) -> list[Stream]:
    chance = acceptance if callable(acceptance) else lambda _: acceptance
    return [Stream(i, tokens, chance, context) for i in range(count)]


def scaled(points, factor: float):
    return tuple((x, y * factor) for x, y in points)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
def test_within_three_percent_of_the_best_fixed_k(acceptance, batch) -> None:
    shares = []
    lengths = [0, 1, 2, 3, 4, 6, 8]
    for seed in range(2):
        seen = best_fixed(
            lambda: streams(acceptance, batch, 1000), batch=batch, seed=seed, lengths=lengths
        )
        steered = serve(controller(), streams(acceptance, batch, 1000), batch=batch, seed=seed)
        assert steered.tokens == seen[1].tokens == 1000 * batch
        shares.append(steered.rate / seen[1].rate)
    assert sum(shares) / 2 >= 0.97


@pytest.mark.parametrize("batch", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("acceptance", [0.1, 0.3, 0.5])
def test_never_much_slower_than_no_drafts(acceptance, batch) -> None:
    plain = serve(Fixed(0), streams(acceptance, batch + 4, 300), batch=batch)
    steered = serve(controller(), streams(acceptance, batch + 4, 300), batch=batch)
    assert steered.rate >= 0.98 * plain.rate


@pytest.mark.parametrize("costs", [COSTS, FREE], ids=["draft model", "n-gram"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("turns", [1, 4])
def test_a_draft_that_is_always_wrong_costs_at_most_three_percent(batch, turns, costs) -> None:
    """Learning, probes and the rows that probes catch up on included; newcomers in later turns."""
    wrong = [streams(0.0, batch * turns, 500) for _ in range(2)]
    plain = serve(Fixed(0), wrong[0], costs, batch=batch)
    steered = serve(controller(costs), wrong[1], costs, batch=batch)
    assert steered.seconds <= 1.03 * plain.seconds


@pytest.mark.parametrize("batch", [1, 8])
def test_acceptance_that_changes_in_mid_stream(batch) -> None:
    """Good, useless, good: against a controller that begins anew at each change."""
    phases = [(0.85, 400), (0.0, 400), (0.85, 1600)]
    alone = 0.0
    for acceptance, tokens in phases:
        run = best_fixed(
            lambda a=acceptance, n=tokens: streams(a, batch, n), batch=batch, lengths=[0, 2, 4]
        )
        alone += run[1].seconds

    def changing(t: int) -> float:
        return 0.0 if 400 <= t < 800 else 0.85

    steered = serve(controller(), streams(changing, batch, 2400), batch=batch)
    assert steered.seconds <= 1.25 * alone
    assert sum(sum(lengths) for _, lengths, _ in steered.steps[-40:]) > 0, "it has come back"
    plain = serve(Fixed(0), streams(changing, batch, 2400), batch=batch)
    assert steered.seconds < 0.85 * plain.seconds


def mixed(count: int, tokens: int, rates: tuple[float, ...]) -> list[Stream]:
    """Requests of several kinds in turn."""
    return [Stream(i, tokens, lambda _, i=i: rates[i % len(rates)]) for i in range(count)]


@pytest.mark.parametrize(
    ("costs", "most", "rates"),
    [
        (COSTS, 8, (0.95, 0.2)),
        (FREE, 16, (0.98, 0.05)),
    ],
    ids=["draft model", "n-gram"],
)
@pytest.mark.parametrize("batch", [2, 4, 8])
def test_requests_that_differ_gain_over_any_one_k(batch, costs, most, rates) -> None:
    def requests() -> Iterable[Stream]:
        return mixed(batch, 10_000, rates)

    lengths = [0, 1, 2, 3, 4, 6, 8, 12, 16][: 7 if most == 8 else 9]
    _, best = best_fixed(requests, costs, batch=batch, most=most, lengths=lengths, until=10.0)
    steered = serve(controller(costs, most), requests(), costs, batch=batch, most=most, until=10.0)
    assert steered.rate >= (1.1 if batch > 2 or costs is FREE else 1.06) * best.rate


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_requests_that_differ_and_end(batch) -> None:
    """Fast ones leave the slow ones behind, so that the best for the moment is not the best."""

    def requests() -> Iterable[Stream]:
        return mixed(3 * batch, 300, (0.95, 0.2))

    _, best = best_fixed(requests, batch=batch, lengths=[0, 1, 2, 3, 4, 6])
    steered = serve(controller(), requests(), batch=batch)
    assert steered.rate >= 0.98 * best.rate


def test_copiers_among_others_that_seldom_match() -> None:
    """N-gram that matches copiers always and others now and then. The copiers soon end, and the
    best k for all is the best for the others."""

    def requests() -> Iterable[Stream]:
        for i in range(8):
            copies = i % 4 == 0
            yield Stream(
                i,
                500,
                lambda _, copies=copies: 0.97 if copies else 0.2,
                matches=lambda t, copies=copies: copies or t % 5 == 0,
            )

    _, best = best_fixed(requests, FREE, most=16, lengths=[0, 1, 2, 3, 4, 6, 8, 12, 16])
    steered = serve(controller(FREE, 16), requests(), FREE, most=16)
    assert steered.rate >= 0.97 * best.rate


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("part", ["forward", "draft"])
def test_costs_that_were_wrong_are_corrected(part, factor, batch) -> None:
    told = replace(COSTS, **{part: scaled(getattr(COSTS, part), factor)})
    _, best = best_fixed(lambda: streams(0.7, batch, 1000), batch=batch, lengths=[1, 2, 4, 5])
    steered = serve(controller(told), streams(0.7, batch, 1000), batch=batch)
    assert steered.rate >= 0.96 * best.rate


def test_rows_that_are_dearer_than_was_measured() -> None:
    """Told that rows are free, where eight more double the time: the clock says otherwise."""
    told = replace(COSTS, forward=((1, 20e-3), (64, 20e-3)))
    dear = replace(COSTS, forward=((1, 20e-3), (8, 20e-3), (16, 40e-3), (64, 160e-3)))
    _, best = best_fixed(lambda: streams(0.4, 8, 1500), dear, lengths=[0, 1, 2])
    steered = serve(controller(told), streams(0.4, 8, 1500), dear)
    assert steered.rate >= 0.9 * best.rate


@pytest.mark.parametrize("batch", [1, 8])
def test_a_clock_with_noise_and_stalls(batch) -> None:
    chance = random.Random(3)

    def clock(seconds: float) -> float:
        stalled = 10.0 if chance.random() < 0.05 else 1.0
        return seconds * stalled * max(0.5, chance.gauss(1.0, 0.1))

    _, best = best_fixed(lambda: streams(0.7, batch, 1000), batch=batch, lengths=[1, 2, 4, 5])
    steered = serve(controller(), streams(0.7, batch, 1000), batch=batch, clock=clock)
    assert steered.rate >= 0.96 * best.rate


@pytest.mark.parametrize("batch", [1, 8])
def test_without_costs_the_clock_teaches(batch) -> None:
    plain: Served = serve(Fixed(0), streams(0.8, batch, 1500), batch=batch)
    _, best = best_fixed(lambda: streams(0.8, batch, 1500), batch=batch, lengths=[2, 3, 4, 6, 7])
    steered = serve(controller(None), streams(0.8, batch, 1500), batch=batch)
    assert steered.rate >= 0.93 * best.rate > plain.rate
