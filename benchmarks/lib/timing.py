"""Timing several calls against each other: alternately, in one process, medians.

A run's `Budget` shares out its seconds among its cases.

Promises that whatever drifts (clock, neighbors on the machine) meets every trial alike: trials
take turns call by call, in another order in every round, so that none always follows the same one.
Knows nothing of what is called.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# OpenMP threads spin for a while after a call; another process must not be timed meanwhile.
SETTLE_SECONDS = 0.02
# Threads that wake may share a core until the scheduler's next tick (4 ms) moves one of them.
WAKE_SECONDS = 0.01


FEW_CALLS = 5
"""Below it a median and a spread say nothing of the next run."""


class Timing(NamedTuple):
    """Milliseconds per call.

    Attributes:
        ms: median.
        low, high: quartiles.
        best: smallest; where others use the machine, what it would be without them.
        calls: how many were timed.
    """

    ms: float
    low: float
    high: float
    best: float
    calls: int

    @property
    def told(self) -> bool:
        """Whether there were enough calls to speak of a spread, or of a goal as met."""
        return self.calls >= FEW_CALLS

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.high - self.low) / self.ms

    def document(self, counted: str) -> dict[str, float | None]:
        """Fields of a row; `counted` names what was timed. The spread of few calls is null."""
        return {
            "ms": self.ms,
            "ms_low": self.low,
            "ms_high": self.high,
            "ms_min": self.best,
            "spread": self.spread if self.told else None,
            counted: self.calls,
        }


class Timed(ABC):
    """Something that can be called with the number of a rotating set.

    Attributes:
        threads: OpenMP threads that it wants.
        process: "" in this process; otherwise a name for the process that does the work.
        first_set: where it begins in its rotating sets; trials over the same memory begin far from
            each other, lest one reads what another has just brought into the cache.
    """

    threads: int
    process: str = ""
    first_set: int = 0

    @abstractmethod
    def call(self, index: int) -> None:
        """Does the work once on set `index` (taken modulo the number of sets)."""

    def measure(self, index: int) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.call(index)
        return time.perf_counter() - start

    @abstractmethod
    def enter(self) -> None:
        """Called before a turn that follows one of another process or thread count."""


class TrialError(Exception):
    """A trial failed where it was called.

    Attributes:
        place: of the trial among those that took turns.
        problem: what it raised.
    """

    def __init__(self, place: int, problem: Exception) -> None:
        super().__init__(str(problem))
        self.place = place
        self.problem = problem


class Budget:
    """The seconds of a run, shared out among its cases.

    Args:
        seconds: for all cases; None: as long as they take.
        clock: seconds, for tests.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = math.inf if seconds is None else clock() + seconds

    def left(self) -> float:
        """Seconds; infinite without a budget."""
        return self._end - self._clock()

    def is_spent(self) -> bool:
        """Whether no further case may begin."""
        return self.left() <= 0.0

    def part(self, cases_left: int) -> Budget:
        """What the next of so many cases may take."""
        left = self.left()
        return Budget(None if math.isinf(left) else left / cases_left, self._clock)


def orders(count: int) -> Iterator[list[int]]:
    """Without end: in which order `count` trials take their turns, another one in every round, so
    that none always follows the same one. Two simply change places."""
    order, draw = list(range(count)), random.Random(0)
    while True:
        yield list(order)
        if count == 2:
            order.reverse()
        else:
            draw.shuffle(order)


def summary(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of the calls.

    Raises:
        ValueError: there is none.
    """
    if not seconds:
        raise ValueError("seconds is empty; allowed: at least one timed call")
    ms = [value * 1e3 for value in seconds]
    if len(ms) < 2:
        return Timing(ms[0], ms[0], ms[0], ms[0], 1)
    low, median, high = statistics.quantiles(ms, n=4, method="inclusive")
    return Timing(median, low, high, min(ms), len(ms))


def _turn(trial: Timed, index: int, inside: tuple[str, int] | None) -> float:
    """Seconds of a trial's call; `inside`: process and threads of the turn before."""
    if (trial.process, trial.threads) != inside:
        other_process = inside is not None and inside[0] != trial.process
        if other_process:
            time.sleep(SETTLE_SECONDS)
        trial.enter()
        # Threads that slept or do not exist yet: the first calls are not the rule.
        # They take the set used last, so that no set is cached when its turn comes.
        awake = time.perf_counter() + (WAKE_SECONDS if other_process else 0.0)
        trial.call(index - 1)
        while time.perf_counter() < awake:
            trial.call(index - 1)
    return trial.measure(index)


def alternate(
    trials: Sequence[Timed],
    budget: float,
    *,
    min_rounds: int = 5,
    max_rounds: int = 2000,
    limit: Budget | None = None,
    tick: Callable[[float], None] = lambda fraction: None,
) -> list[Timing]:
    """Times the trials in turns.

    Args:
        trials: each is called once per round, on the next of its sets.
        budget: seconds for all of them together; a round that has begun is finished.
        min_rounds: rounds done whatever the budget.
        max_rounds: where to stop although there is budget left.
        limit: once it is spent, the round that has begun is the last, whatever `min_rounds`.
        tick: told the fraction of the work done, after every round.

    Returns:
        One `Timing` per trial.

    Raises:
        TrialError: a trial raised something.
    """
    samples: list[list[float]] = [[] for _ in trials]
    inside: tuple[str, int] | None = None
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for rounds, order in enumerate(orders(len(trials))):
            elapsed = time.perf_counter() - start
            if rounds >= max_rounds or (rounds >= min_rounds and elapsed >= budget):
                break
            if rounds and limit is not None and limit.is_spent():
                break
            for place in order:
                trial = trials[place]
                try:
                    seconds = _turn(trial, rounds + trial.first_set, inside)
                except Exception as problem:
                    raise TrialError(place, problem) from problem
                inside = (trial.process, trial.threads)
                samples[place].append(seconds)
            elapsed = time.perf_counter() - start
            tick(min(1.0, max(elapsed / budget if budget > 0 else 1.0, 0.0)))
    finally:
        if collecting:
            gc.enable()
    return [summary(values) for values in samples]
