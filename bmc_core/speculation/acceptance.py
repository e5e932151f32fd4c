"""How likely draft tokens are to be accepted: estimates by request and position that fade.

Data are censored: j accepted of k says success at positions 1 ... j, failure at j + 1 if j < k, and
nothing of the rest. For each position successes and failures are counted, given that all before it
were accepted; older ones fade with every new observation of the request. Survival, the probability
that a position and all before it are accepted, is the product of the estimates.

What a request has not shown yet is taken from its drafter: counts of all of the drafter's requests,
each position drawn towards the one before it and the first towards `START`. It is shifted by how
the request has done at other positions (an odds ratio, itself drawn towards 1), so that one that
copies is trusted with long drafts before it was seen with any, and one that does not with none.

Knows nothing of costs. Observations are kept until `learn`, which takes them all at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from bmc_core.speculation.costs import Floats

Ints = NDArray[np.int64]

START = 0.6
"""Acceptance of a drafter of which nothing is known: hope, as one try is cheap."""
START_WEIGHT = 1.5
POSITION_WEIGHT = 1.5
"""Observations that the estimate of the position before counts for, in a drafter's counts."""
DRAFTER_WEIGHT = 4.0
"""Observations that the drafter's estimate counts for, in a request's."""
SHIFT_WEIGHT = 1.0
"""Observations that draw a request's odds ratio towards 1."""
REQUEST_FADE = 0.97
DRAFTER_FADE = 0.99

_LIKELIEST = 0.995
"""No estimate of a drafter is nearer to 0 or 1 than this, so that odds exist."""


class _Drafter:
    """Counts of all requests of one drafter, and what follows for a new one."""

    def __init__(self, positions: int) -> None:
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
        self.pending: list[int] = []

    @property
    def slots(self) -> int:
        """Slots that exist, in use or not."""
        return len(self._owner)

    def slot(self, request_id: Hashable, drafter: str) -> tuple[int, bool]:
        """The slot of a request, and whether it is new."""
        known = self._drafters.get(drafter)
        if known is None:
            known = self._drafters[drafter] = _Drafter(self.positions)
        slot = known.slots.get(request_id)
        if slot is not None:
            return slot, False
        if self._free:
            slot = self._free.pop()
            self._owner[slot] = known
            self._counts[slot] = 0.0
        else:
            slot = len(self._owner)
            self._owner.append(known)
            if slot == len(self._counts):
                more = np.zeros((max(16, slot), 2, self.positions))
                self._counts = np.concatenate([self._counts, more])
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
        size = self.positions + 1
        codes = np.array(self.pending)
        self.pending.clear()
        codes, accepted = np.divmod(codes, size)
        slots, proposed = np.divmod(codes, size)
        touched, which = np.unique(slots, return_inverse=True)
        shape = (len(touched), size)
        ends = which * size + accepted
        reached = np.bincount(ends, minlength=len(touched) * size).reshape(shape)
        failed = np.bincount(ends, accepted < proposed, len(touched) * size).reshape(shape)
        added = np.empty((len(touched), 2, self.positions))
        added[:, 0] = reached[:, :0:-1].cumsum(axis=1)[:, ::-1]
        added[:, 1] = failed[:, :-1]
        times = reached.sum(axis=1)
        self._counts[touched] *= (REQUEST_FADE**times)[:, None, None]
        self._counts[touched] += added
        self._teach_drafters(touched.tolist(), added, times)
        self._release()
        return touched[reached[:, 0] < times]

    def _teach_drafters(self, touched: Sequence[int], added: Floats, times: Ints) -> None:
        if len(self._drafters) == 1:
            next(iter(self._drafters.values())).learn(added.sum(axis=0), int(times.sum()))
            return
        owners = [self._owner[slot] for slot in touched]
        for drafter in self._drafters.values():
            own = [place for place, owner in enumerate(owners) if owner is drafter]
            if own:
                drafter.learn(added[own].sum(axis=0), int(times[own].sum()))

    def survival(self, slots: Sequence[int]) -> Floats:
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
        shift = (successes + SHIFT_WEIGHT) * (missed + SHIFT_WEIGHT)
        shift /= (failures + SHIFT_WEIGHT) * (expected + SHIFT_WEIGHT)
        odds = hope * shift[:, None]
        likely = (right + DRAFTER_WEIGHT * (odds / (odds + (1 - hope)))) / (trials + DRAFTER_WEIGHT)
        return np.cumprod(likely, axis=1)

    def cap(self, slots: Sequence[int], weight: float) -> None:
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
