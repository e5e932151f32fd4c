"""Turns, budgets and summaries."""

import time
from itertools import islice

import pytest

from benchmarks.lib.timing import Budget, Timed, alternate, orders, summary


class Sleeper(Timed):
    def __init__(self, seconds: float, threads: int = 1) -> None:
        self.seconds, self.threads = seconds, threads
        self.entered = 0
        self.indices: list[int] = []

    def enter(self) -> None:
        self.entered += 1

    def call(self, index: int) -> None:
        self.indices.append(index)
        time.sleep(self.seconds)


def test_alternate_takes_turns() -> None:
    trials = [Sleeper(0.001), Sleeper(0.004)]
    fractions: list[float] = []
    fast, slow = alternate(trials, 0.0, min_rounds=4, tick=fractions.append)
    assert fast.calls == slow.calls == 4
    assert fast.ms < slow.ms
    assert trials[1].indices == [0, 1, 2, 3]
    assert [trial.entered for trial in trials] == [1, 0]
    assert fractions[-1] == 1.0


def test_two_change_places_and_more_are_shuffled() -> None:
    assert list(islice(orders(2), 4)) == [[0, 1], [1, 0], [0, 1], [1, 0]]
    many = list(islice(orders(5), 20))
    assert many[0] == [0, 1, 2, 3, 4]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in many)
    assert len({tuple(order) for order in many}) > 10


class Clock:
    """Seconds that only pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_is_shared_out_among_what_is_left() -> None:
    clock = Clock()
    budget = Budget(90.0, clock)
    part = budget.part(3)
    assert part.left() == 30.0
    clock.now = 30.0
    assert part.is_spent()
    assert not budget.is_spent()
    assert budget.part(2).left() == 30.0
    clock.now = 90.0
    assert budget.is_spent()
    unlimited = Budget(None, clock)
    assert not unlimited.part(3).is_spent()


def test_a_spent_limit_ends_the_rounds_but_not_the_first() -> None:
    """The slowest call there is costs one round, whatever is asked for at least."""
    clock = Clock()

    class Slow(Sleeper):
        def call(self, index: int) -> None:
            self.indices.append(index)
            clock.now += 40.0

    trials = [Slow(0.0), Slow(0.0)]
    timings = alternate(trials, 1e9, min_rounds=5, limit=Budget(100.0, clock))
    assert [timing.calls for timing in timings] == [1, 1]
    assert sum(len(trial.indices) for trial in trials) == 3, "one that is not timed"


def test_no_trial_always_follows_the_same_one() -> None:
    turns: list[int] = []

    class Noted(Sleeper):
        def call(self, index: int) -> None:
            turns.append(trials.index(self))

    trials = [Noted(0.0) for _ in range(3)]
    alternate(trials, 0.0, min_rounds=12, max_rounds=12)
    rounds = [turns[i : i + 3] for i in range(1, len(turns), 3)]  # after the first, untimed call
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert {turns[i - 1] for i in range(2, len(turns)) if turns[i] == 0} >= {1, 2}


def test_trials_over_the_same_memory_begin_apart() -> None:
    trials = [Sleeper(0.0), Sleeper(0.0)]
    trials[1].first_set = 7
    alternate(trials, 0.0, min_rounds=3, max_rounds=3)
    assert [trial.indices for trial in trials] == [[-1, 0, 1, 2], [7, 8, 9]]


def test_a_change_of_threads_costs_an_untimed_call() -> None:
    trials = [Sleeper(0.0, threads=1), Sleeper(0.0, threads=2)]
    timings = alternate(trials, 0.0, min_rounds=3, max_rounds=3)
    assert [t.calls for t in timings] == [3, 3]
    assert sum(len(trial.indices) for trial in trials) > 6


def test_summary() -> None:
    timing = summary([0.001, 0.002, 0.003, 0.004, 0.1])
    assert (timing.ms, timing.low, timing.high, timing.best) == (3.0, 2.0, 4.0, 1.0)
    assert timing.spread == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one"):
        summary([])
