"""What the clock says of predicted costs: factors that follow the machine, step by step.

A measured forward over a predicted one is taken apart into a level, which all steps share (another
job on the machine, a longer context than any that was measured), and a deviation by rows of the
batch, which is the form of the curve. The form is learned where the rows of a step are others than
those of the step before, as only then the two can be told apart. Both are medians of the last
samples: a step that stalls for ten times its time changes nothing, and a level that doubles is
followed within five steps without being taken for a change of form. Knows no requests.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from bmc_core.speculation.costs import Floats

LEVEL_SAMPLES = 9
FORM_SAMPLES = 31
FEW_SAMPLES = (0.0, 0.5, 0.7)
"""What a deviation of so many samples counts for: they may be stalls."""
AGE_STEPS = 256
"""After so many steps without a sample a deviation loses one of its own."""


class Median:
    """Median of the last samples, logarithms of ratios. 0 without any."""

    def __init__(self, samples: int) -> None:
        self._samples: deque[float] = deque(maxlen=samples)
        self.value = 0.0

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, sample: float) -> None:
        self._samples.append(sample)
        self._update()

    def drop(self) -> None:
        """The oldest sample goes."""
        self._samples.popleft()
        self._update()

    def _update(self) -> None:
        ordered = sorted(self._samples)
        half = len(ordered) // 2
        self.value = (ordered[half] + ordered[~half]) / 2 if ordered else 0.0


@dataclass
class _Deviation:
    """Of steps with about so many rows."""

    median: Median
    aged: int

    @property
    def value(self) -> float:
        count = len(self.median)
        return self.median.value * (FEW_SAMPLES[count] if count < len(FEW_SAMPLES) else 1.0)


class CostCorrection:
    """Factors on predicted seconds: by rows for the forward, one each for sampling and drafting."""

    def __init__(self) -> None:
        self.steps = 0
        self._level = Median(LEVEL_SAMPLES)
        self._forms: dict[int, _Deviation] = {}
        self._last = -1
        self._places: Floats = np.empty(0)
        self._sampling = Median(LEVEL_SAMPLES)
        self._drafting = Median(LEVEL_SAMPLES)

    @property
    def sampling_factor(self) -> float:
        return math.exp(self._sampling.value)

    @property
    def draft_factor(self) -> float:
        return math.exp(self._drafting.value)

    def forward(self, rows: int, measured: float, predicted: float) -> None:
        """A forward of so many rows of the batch took `measured` seconds."""
        if not usable(measured, predicted):
            return
        self.steps += 1
        place = _place(rows)
        form = self._forms.get(place)
        if form is None:
            form = self._forms[place] = _Deviation(Median(FORM_SAMPLES), self.steps)
        ratio = math.log(measured / predicted)
        if place != self._last and len(self._level):
            form.median.add(ratio - self._level.value)
        self._last = place
        self._level.add(ratio - form.value)
        form.aged = self.steps
        if self.steps % AGE_STEPS == 0:
            self._age()

    def sampling(self, measured: float, predicted: float) -> None:
        if usable(measured, predicted):
            self._sampling.add(math.log(measured / predicted))

    def drafting(self, measured: float, predicted: float) -> None:
        if usable(measured, predicted):
            self._drafting.add(math.log(measured / predicted))

    def factors(self, count: int) -> Floats:
        """Factors on the forward for 0 ... count - 1 rows: between two measured numbers of rows in
        proportion to the logarithm of rows, beyond them as the nearest."""
        if not self._forms:
            return np.full(count, math.exp(self._level.value))
        places = sorted(self._forms)
        if len(self._places) != count:
            self._places = 2 * np.log2(np.maximum(1, np.arange(count)))
        deviations = np.interp(self._places, places, [self._forms[place].value for place in places])
        return np.exp(self._level.value + deviations)

    def _age(self) -> None:
        """What was not measured for long is forgotten, so that it is tried again."""
        for place, form in list(self._forms.items()):
            if self.steps - form.aged >= AGE_STEPS:
                if len(form.median):
                    form.median.drop()
                else:
                    del self._forms[place]


def usable(measured: float, predicted: float) -> bool:
    return predicted > 0.0 and measured > 0.0 and math.isfinite(measured)


def _place(rows: int) -> int:
    """Numbers of rows within a factor of 1.2 share their samples."""
    return round(2 * math.log2(max(1, rows)))
