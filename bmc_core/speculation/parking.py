"""When a draft that does not pay is asked again.

A request whose drafts are not worth verifying is probed with `PROBE_TOKENS`, at intervals that
double with every failure: what is always wrong costs a row in 32 steps, then one in 64, up to one
in 512. A drafter that pays for no request does not run at all, and is probed likewise; as a probe
makes a draft model take in all rows that it missed, it also waits until that is a small share of
the time since it last ran. Knows neither estimates nor costs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

FIRST_STEPS, MOST_STEPS = 32, 512
"""Between two probes."""
NEWCOMER_STEPS = 8
"""Before the first probe of a request that starts parked."""
PROBE_TOKENS = 1
"""Draft tokens of a probe: whether the first is right says whether to go on."""
PROBED_REQUESTS = 8
"""Requests that a step probes at most, as each takes a row."""
PROBE_WEIGHT = 8.0
"""Observations that the past counts for when a probe starts."""
FOLLOW_UPS = 4
"""Of a drafter's probe that was right."""
PROBE_SHARE = 0.02
"""Of all steps, for probes of a drafter and the rows that they catch up on."""
GAIN_SHARE = 0.1
"""Of the time that drafts have saved, for the same: what has paid before may pay again."""
MOST_CREDIT = 64.0
"""Steps that may be saved up for probes."""
POSTPONED_STEPS = 8
MOST_REST = 2048
"""Steps after which a drafter is probed whatever that costs."""


class RequestProbes:
    """Probes of requests by slot, see `Acceptance.slot`."""

    def __init__(self) -> None:
        self._due: Ints = np.empty(0, np.int64)
        self._gap: Ints = np.empty(0, np.int64)
        self.since: Ints = np.empty(0, np.int64)
        """The step at which each slot's request came."""

    def admit(self, slot: int, now: int) -> None:
        """A request is new in its slot."""
        if slot >= len(self._due):
            more = np.zeros(max(16, slot + 1), np.int64)
            self._due, self._gap, self.since = (
                np.concatenate([array, more]) for array in (self._due, self._gap, self.since)
            )
        self._due[slot] = now + NEWCOMER_STEPS
        self._gap[slot] = FIRST_STEPS
        self.since[slot] = now

    def rewarded(self, slots: Ints, now: int) -> None:
        """Drafts of these were accepted: one that is parked is asked again at once."""
        self._due[slots] = now
        self._gap[slots] = np.maximum(FIRST_STEPS, self._gap[slots] // 2)

    def verified(self, slots: Ints, now: int) -> None:
        """These are not parked."""
        self._due[slots] = now + FIRST_STEPS
        self._gap[slots] = FIRST_STEPS

    def take(self, slots: Ints, now: int) -> NDArray[np.bool_]:
        """Which of these, all parked, are probed now."""
        due = self._due[slots]
        chosen = due <= now
        if np.count_nonzero(chosen) > PROBED_REQUESTS:
            chosen[np.argsort(due, kind="stable")[PROBED_REQUESTS:]] = False
        probed = slots[chosen]
        self._due[probed] = now + self._gap[probed]
        self._gap[probed] = np.minimum(2 * self._gap[probed], MOST_STEPS)
        return chosen


class DrafterRest:
    """Whether the drafter is parked, since when, and when it is asked again.

    Attributes:
        parked: it does not run.
        ran: the last step in which it did.
    """

    def __init__(self) -> None:
        self.parked = False
        self.ran = 0
        self._woke = 0
        self._due = 0
        self._gap = FIRST_STEPS
        self._credit = 0.0
        self._follow_ups = 0
        self._rewarded = False

    def park(self, now: int) -> None:
        """It pays no more. One that had woken only for a moment sleeps longer."""
        short = self._woke > 0 and now - self._woke < self._gap
        self._gap = min(2 * self._gap, MOST_STEPS) if short else FIRST_STEPS
        self.parked = True
        self._due = now + self._gap

    def wake(self, now: int) -> None:
        self.parked = False
        self._woke = self.ran = now

    def due(self, now: int) -> bool:
        return now >= self._due

    def earn(self, steps: float) -> None:
        """Time that probes may take, in steps without drafts."""
        self._credit = min(self._credit + steps, MOST_CREDIT)

    def pay(self, steps: float, now: int) -> bool:
        """Whether a probe that takes so long may be; its time is spent then."""
        if steps > self._credit and now - self.ran < MOST_REST:
            return False
        self._credit = max(0.0, self._credit - steps)
        return True

    def probe(self, now: int) -> None:
        """It runs for one step."""
        if self._rewarded:
            self._follow_ups -= 1
        else:
            self._follow_ups = FOLLOW_UPS
            self._gap = min(2 * self._gap, MOST_STEPS)
        self._rewarded = False
        self._due = now + self._gap
        self.ran = now

    def postpone(self, now: int) -> None:
        """A probe is due and would take too long: others may have come soon."""
        self._due = now + POSTPONED_STEPS

    def rewarded(self, now: int) -> None:
        """The probe was right: another follows at once, but for some that still do not pay."""
        if self.parked and self._follow_ups > 0:
            self._rewarded = True
            self._due = now
