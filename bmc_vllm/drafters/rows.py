"""Which rows a draft model has computed of each request, and which it missed.

A draft model that does not run in a step has no K and V of that step's rows: it has to compute
them before its next draft, or its drafts stay bad for good. Promises to know the missed rows of
every request of a batch, also those in blocks that a request took over from the prefix cache.
Knows nothing of models: requests have ids, and block tables are arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """Rows `start` to `end` (exclusive) of the request at `place` of the batch."""

    place: int
    start: int
    end: int


@dataclass(frozen=True)
class StepRows:
    """What one step computes, in the order of the batch.

    Args:
        ids: of the requests.
        first: int `[requests]`, the first row that the step computes of each.
        counts: int `[requests]`, how many; rejected draft tokens included.
        tables: int `[requests or more, blocks]`, block tables.
    """

    ids: list[str]
    first: np.ndarray
    counts: np.ndarray
    tables: np.ndarray


class DraftRows:
    """See the module docstring.

    Args:
        block_size: rows of a block of the tables.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._complete: set[str] = set()
        self._missed: dict[str, int] = {}  # the first row that is missing
        self._holes: set[int] = set()  # blocks with rows that are missing

    def forget(self, ids: Iterable[str]) -> None:
        """Requests have ended, or lost their blocks."""
        for request_id in ids:
            self._complete.discard(request_id)
            self._missed.pop(request_id, None)

    def spans(self, step: StepRows) -> list[Span]:
        """Rows before this step's that the draft model has not computed."""
        if not self._missed and self._complete.issuperset(step.ids):
            return []
        firsts = step.first.tolist()
        starts = (self._start(index, first, step) for index, first in enumerate(firsts))
        found = (Span(index, *rows) for index, rows in enumerate(zip(starts, firsts, strict=True)))
        return [span for span in found if span.start < span.end]

    def computed(self, step: StepRows, which: Collection[int] | None = None) -> None:
        """The draft model has all rows of these requests now, this step's included."""
        for index in range(len(step.ids)) if which is None else which:
            request_id = step.ids[index]
            if self._holes:
                first, count = int(step.first[index]), int(step.counts[index])
                blocks = self._blocks(index, self._start(index, first, step), first + count, step)
                self._holes.difference_update(blocks)
            self._complete.add(request_id)
            self._missed.pop(request_id, None)

    def missed(self, step: StepRows, which: Collection[int] | None = None) -> None:
        """The draft model has not seen this step's rows of these requests."""
        places = list(range(len(step.ids)) if which is None else which)
        firsts = step.first.tolist()
        for place in places:
            first, known = firsts[place], self._missed.get(step.ids[place])
            # Most often a request that is parked already.
            if known is None or first < known:
                self._missed[step.ids[place]] = self._start(place, first, step)
                self._complete.discard(step.ids[place])
        self._holes.update(self._written(places, step))

    def _written(self, places: list[int], step: StepRows) -> Iterator[int]:
        """The blocks that this step's rows of these requests lie in."""
        first = step.first[places] // self._block_size
        last = (step.first[places] + step.counts[places] - 1) // self._block_size
        for further in range(int((last - first).max(initial=-1)) + 1):
            yield from step.tables[places, np.minimum(first + further, last)].tolist()

    def _start(self, index: int, first: int, step: StepRows) -> int:
        """The first row that is missing; `first` where none is."""
        request_id = step.ids[index]
        if request_id in self._complete:
            return first
        if request_id in self._missed:
            return min(first, self._missed[request_id])
        if self._holes and first:  # new, and begins with rows of the prefix cache
            for place, block in enumerate(self._blocks(index, 0, first, step)):
                if block in self._holes:
                    return place * self._block_size
        return first

    def _blocks(self, index: int, start: int, end: int, step: StepRows) -> list[int]:
        size = self._block_size
        return step.tables[index, start // size : -(-end // size)].tolist()
