"""How likely draft tokens are to be accepted: estimates by request and position that fade.

Data are censored: j accepted of k says success at positions 1 ... j, failure at j + 1 if j < k, and
nothing of the rest. For each position successes and failures are counted, given that all before it
were accepted; older ones fade with every new observation of the request. Survival, the probability
that a position and all before it are accepted, is the product of the estimates.

What a request has not shown yet is taken from its drafter: counts of all of the drafter's requests,
each position drawn towards the one before it and the first towards `START`. It counts for the more,
the more alike the requests are: the luck of one is not its nature then. It is shifted by how
the request has done at other positions (an odds ratio, itself drawn towards 1), so that one that
copies is trusted with long drafts before it was seen with any, and one that does not with none.

Knows nothing of costs. Observations are kept until `learn`, which takes them all at once.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from bmc_core.speculation.costs import Floats

Ints = NDArray[np.int64]

START = 0.6
"""Acceptance of a drafter of which nothing is known: hope, as one try is cheap."""
START_WEIGHT = 1.5
POSITION_WEIGHT = 8.0
"""Observations that the estimate of the position before counts for, in a drafter's counts."""
DRAFTER_WEIGHT = 4.0
"""Observations that the drafter's estimate counts for, in a request's."""
SHIFT_WEIGHT = 1.0
"""Observations that draw a request's odds ratio towards 1."""
SLOW_START = 2
REQUEST_FADE = 0.97
IDLE_FADE = 0.99
CHANCE = 0.7
"""Mean square of what requests show beyond their drafter's estimate, over its variance, where they
are all alike; below 1, as fading counts make up for some of it."""
ALIKE = 2.0
MOST_ALIKE = 8.0
DRAFTER_FADE = 0.99

_LIKELIEST = 0.995
"""No estimate of a drafter is nearer to 0 or 1 than this, so that odds exist."""


class _Drafter:
    """Counts of all requests of one drafter, and what follows for a new one."""

    def __init__(self, name: str, positions: int) -> None:
        self.name = name
        self.counts = np.zeros((2, positions))
        self.slots: dict[Hashable, int] = {}
        self.estimate = np.full(positions, START)

    def learn(self, added: Floats, observations: int) -> None:
        self.counts *= DRAFTER_FADE**observations
        self.counts += added
        self._estimate()

    def cap(self, weight: float) -> None:
        _cap(self.counts[None], weight)
        self._estimate()

    def _estimate(self) -> None:
        right, wrong = self.counts.tolist()
        before, weight = START, START_WEIGHT
        for place, (success, failure) in enumerate(zip(right, wrong, strict=True)):
            before = (success + weight * before) / (success + failure + weight)
            self.estimate[place] = min(max(before, 1 - _LIKELIEST), _LIKELIEST)
            weight = POSITION_WEIGHT


class Acceptance:
    """Estimates for the requests of any number of drafters.

    A request has a slot with each drafter that it was asked for; slots are reused after `forget`,
    so memory follows the requests that live at once.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self._drafters: dict[str, _Drafter] = {}
        self._owner: list[_Drafter] = []
        self._free: list[int] = []
        self._ended: list[int] = []
        self._counts = np.zeros((0, 2, positions))
        self._longest = np.zeros(0, np.int64)
        self._ones = np.ones(positions)
        self.pending: list[int] = []

    @property
    def slots(self) -> int:
        """Slots that exist, in use or not."""
        return len(self._owner)

    def slot(self, request_id: Hashable, drafter: str) -> tuple[int, bool]:
        """The slot of a request, and whether it is new."""
        known = self._drafters.get(drafter)
        if known is None:
            known = self._drafters[drafter] = _Drafter(drafter, self.positions)
        slot = known.slots.get(request_id)
        if slot is not None:
            return slot, False
        if self._free:
            slot = self._free.pop()
            self._owner[slot] = known
            self._counts[slot] = 0.0
            self._longest[slot] = 0
        else:
            slot = len(self._owner)
            self._owner.append(known)
            if slot == len(self._counts):
                more = np.zeros((max(16, slot), 2, self.positions))
                self._counts = np.concatenate([self._counts, more])
                self._longest = np.concatenate([self._longest, np.zeros(len(more), np.int64)])
        known.slots[request_id] = slot
        return slot, True

    def observe(self, request_id: Hashable, proposed: int, accepted: int, drafter: str) -> None:
        """Of a request that has a slot; others are not counted."""
        try:
            slot = self._drafters[drafter].slots[request_id]
        except KeyError:
            for known in self._drafters.values():
                if request_id in known.slots:
                    slot = known.slots[request_id]
                    break
            else:
                return
        size = self.positions + 1
        self.pending.append((slot * size + proposed) * size + accepted)

    def learn(self) -> Ints:
        """Takes in what was observed; the slots of which any draft token was accepted."""
        if not self.pending:
            self._release()
            return np.empty(0, np.int64)
        size, slots = self.positions + 1, len(self._owner)
        codes = np.array(self.pending)
        self.pending.clear()
        accepted = codes % size
        ends = codes // (size * size) * size + accepted
        failed = accepted < codes // size % size
        reached = np.bincount(ends, minlength=slots * size).reshape(slots, size)
        added = np.empty((slots, 2, self.positions))
        added[:, 0] = reached[:, :0:-1].cumsum(axis=1)[:, ::-1]
        added[:, 1] = np.bincount(ends, failed, slots * size).reshape(slots, size)[:, :-1]
        times = reached.sum(axis=1)
        right = added[:, 0, 0] > 0
        self._counts[:slots] *= (REQUEST_FADE**times)[:, None, None]
        self._counts[:slots] += added
        longest = ((added[:, 0] > 0) @ self._ones).astype(np.int64)
        np.maximum(self._longest[:slots], longest, out=self._longest[:slots])
        self._teach_drafters(added, times)
        self._release()
        return np.flatnonzero(right)

    def _teach_drafters(self, added: Floats, times: Ints) -> None:
        if len(self._drafters) == 1:
            next(iter(self._drafters.values())).learn(added.sum(axis=0), int(times.sum()))
            return
        for drafter in self._drafters.values():
            own = [slot for slot, owner in enumerate(self._owner) if owner is drafter]
            if times[own].any():
                drafter.learn(added[own].sum(axis=0), int(times[own].sum()))

    def reach(self, slots: Ints) -> Ints:
        """[len(slots)]: the most draft tokens that it is wise to try. A request begins with
        `SLOW_START` and may double what was accepted of it, so that one that copies is at its
        longest in a few steps, and one that does not has cost a few rows."""
        return SLOW_START + 2 * self._longest[slots]

    def drafter(self, slot: int) -> str:
        """Who made the drafts of a slot's request."""
        return self._owner[slot].name

    def survival(self, slots: Ints) -> Floats:
        """[len(slots), positions]: that a draft token and all before it are accepted."""
        if len(self._drafters) == 1:
            hope = next(iter(self._drafters.values())).estimate
        else:
            hope = np.array([self._owner[slot].estimate for slot in slots])
        counts = self._counts[slots]
        right = counts[:, 0]
        trials = right + counts[:, 1]
        successes, failures = counts.sum(axis=2).T
        expected = (trials * hope).sum(axis=1)
        missed = successes + failures - expected
        alike = self._alikeness(successes - expected, (trials * hope * (1 - hope)).sum(axis=1))
        pull = SHIFT_WEIGHT * alike
        shift = (successes + pull) * (missed + pull) / ((failures + pull) * (expected + pull))
        odds = hope * shift[:, None]
        weight = DRAFTER_WEIGHT * alike
        likely = (right + weight * (odds / (odds + (1 - hope)))) / (trials + weight)
        return np.cumprod(likely, axis=1)

    def _alikeness(self, surplus: Floats, variance: Floats) -> float:
        """How much more than `DRAFTER_WEIGHT` the drafter's estimate counts for: the less, the more
        requests differ beyond what chance does (1 to `MOST_ALIKE`)."""
        deviation = float((surplus**2 / (variance + 1.0)).mean()) - CHANCE
        if deviation <= 0.0:
            return MOST_ALIKE
        return min(MOST_ALIKE, max(1.0, ALIKE / deviation))

    def fade(self, slots: Ints, steps: int) -> None:
        """So many steps went by in which these requests were not asked: what they have shown is
        less sure, and what others of the drafter show counts for more."""
        self._counts[slots] *= IDLE_FADE**steps

    def cap(self, slots: Ints, weight: float) -> None:
        """What these requests have shown counts for `weight` observations at most: before a new
        try, the past is no longer sure."""
        counts = self._counts[slots]
        _cap(counts, weight)
        self._counts[slots] = counts

    def cap_drafters(self, weight: float) -> None:
        """`cap` for what the drafters know."""
        for drafter in self._drafters.values():
            drafter.cap(weight)

    def forget(self, request_id: Hashable) -> None:
        """A request has ended: its slots are free once what is pending was learned. What its
        drafters know stays."""
        for drafter in self._drafters.values():
            slot = drafter.slots.pop(request_id, None)
            if slot is not None:
                self._ended.append(slot)

    def _release(self) -> None:
        self._free += self._ended
        self._ended.clear()


def _cap(counts: Floats, weight: float) -> None:
    """Scales [n, 2, positions] so that no position has more observations."""
    most = counts.sum(axis=1).max(axis=1)
    counts *= (weight / np.maximum(most, weight))[:, None, None]
