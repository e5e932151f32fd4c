"""The analytical model: what a generation costs for a given growth policy, and which r is best.

Source: BMC (arXiv 2511.12031), with its assumptions spelled out. A sequence has P prompt rows and
gets N new ones. When the rows held are used up, r more are allocated and the n valid rows are
copied: g(n) = c_alloc + c_copy n seconds. Until then every step attends over spare rows too, each
costing c_row seconds. With T = N/r growths, at P, P + r, ..., P + (T - 1) r rows:

    growths:  sum of g(P + i r)      =  T (c_alloc + c_copy P) + c_copy N (T - 1) / 2
    padding:  c_row N (r - 1) / 2    ~  c_row N^2 / (2 T)
    minimum:  T* = N sqrt(c_row / (2 c_alloc + c_copy (2 P + N))),  r* = N / T*

For P = 0 and c_alloc = 0 it is the paper's T* = sqrt(N c_row / c_copy), that is T* ~ sqrt(N).
Writing a row and reading a valid one cost the same whatever r is.

Where padding costs nothing (the native kernel skips it; a view of the valid rows has none), there
is no such minimum: time falls with r until all rows are held up front. Then memory decides: the
smallest r whose time is within `TOLERANCE` of the best. As growths cost about c_copy/(c_read r) of
what attention reads, that r is about c_copy / (TOLERANCE c_read), whatever N is.

With N unknown, growing by r(n) = c sqrt(n) with c = sqrt(2 c_copy / c_row) minimizes, at every n,
growths and padding per new row, c_copy n / r + c_row r / 2. Summed up to N it is 2/3 sqrt(2) = 0.94
of what the best constant r costs, for any N.

Promises: `predict` walks the very capacities that a policy gives, without a loop over tokens; the
closed forms are its continuous limit. Knows no machine: costs come from `calibration`.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bmc_core.policy import MINIMUM_GROWTH, BMCPolicy
from bmc_core.speculation import StepCosts, choose_lengths

TOLERANCE = 0.02
"""Share of the cache's time (growths, padding, reading) given up for less memory in reserve."""

UNKNOWN_LENGTH_ROWS = 1024
"""From here on r grows with the rows where padding is free and N unknown."""

MAX_RESERVE_ROWS = 4096
"""With N unknown, no policy starts with more rows per growth than this."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Costs:
    """Seconds, for all layers and all sequences of a batch together.

    Args:
        c_copy: to copy one row (K and V) into new memory, page faults and release included.
        c_row: of attention for one spare row in one step. 0: the path skips spare rows.
        c_read: of attention for one valid row in one step.
        c_alloc: per growth, whatever it copies.
        growth_curve: (rows copied, seconds) by rising rows. Where given, it stands for c_alloc and
            c_copy: constant before its points, linear between them, then in proportion to rows.
        step_curve: (rows of the batch, seconds) of all else in a step, such as linear layers;
            linear between its points and beyond. Empty: 0.

    Raises:
        ValueError: a cost that is negative or not finite; a curve whose rows do not rise.
    """

    c_copy: float
    c_row: float = 0.0
    c_read: float = 0.0
    c_alloc: float = 0.0
    growth_curve: tuple[tuple[float, float], ...] = ()
    step_curve: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("c_copy", "c_row", "c_read", "c_alloc"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: expected seconds >= 0")
        for name in ("growth_curve", "step_curve"):
            points = getattr(self, name)
            if not all(math.isfinite(x) and math.isfinite(y) and y >= 0 for x, y in points):
                raise ValueError(f"{name}={points}: expected finite points with seconds >= 0")
            if any(a[0] >= b[0] for a, b in itertools.pairwise(points)):
                raise ValueError(f"{name}={points}: expected rising rows")

    def growth_seconds(self, rows: float) -> float:
        """g(n): allocate, copy ``rows`` valid rows, release the old memory."""
        points = self.growth_curve
        if not points:
            return self.c_alloc + self.c_copy * rows
        if rows >= points[-1][0] > 0:
            return points[-1][1] * rows / points[-1][0]
        return _between(points, max(rows, points[0][0]))

    def step_seconds(self, batch_rows: float) -> float:
        """All of a step but attention and growths, for so many rows of the batch."""
        return max(0.0, _between(self.step_curve, batch_rows)) if self.step_curve else 0.0

    def mean_growth_seconds(self, first: int, last: int, parts: int = 64) -> float:
        """Mean of g(n) for n in [first, last]: c_alloc + c_copy (first + last) / 2 if linear."""
        if not self.growth_curve or last <= first:
            return self.growth_seconds((first + last) / 2)
        width = (last - first) / parts
        return sum(self.growth_seconds(first + (i + 0.5) * width) for i in range(parts)) / parts


@dataclass(frozen=True)
class Workload:
    """One generation.

    Args:
        prompt_rows: P, rows of the prompt.
        new_rows: N, rows that are kept after it.
        batch_size: sequences; only the step curve asks for it.
        draft_tokens: k; a step verifies k + 1 rows.
        acceptance: probability that a draft token is accepted, if those before it were.
        row_multiple: the store rounds what it holds up to whole multiples (16 in the native
            layout).

    Raises:
        ValueError: a value out of range.
    """

    prompt_rows: int
    new_rows: int
    batch_size: int = 1
    draft_tokens: int = 0
    acceptance: float = 0.0
    row_multiple: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            *(("prompt_rows", 0), ("new_rows", 0), ("batch_size", 1)),
            *(("draft_tokens", 0), ("row_multiple", 1)),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}={value}: expected an int >= {least}")
        if not 0.0 <= self.acceptance <= 1.0:
            raise ValueError(f"acceptance={self.acceptance}: expected 0 to 1")

    @cached_property
    def kept_per_step(self) -> float:
        """Rows kept of a step's k + 1, on average."""
        return tokens_per_step(self.draft_tokens, self.acceptance)

    @cached_property
    def steps(self) -> int:
        return math.ceil(self.new_rows / self.kept_per_step - _ROUNDING)

    @property
    def limit(self) -> int:
        """Rows that the generation can ever need: the last step's drafts included."""
        return self.prompt_rows + self.new_rows + self.draft_tokens

    def length(self, step: int) -> float:
        """Valid rows before a step, on average."""
        return self.prompt_rows + step * self.kept_per_step

    def needed(self, step: int) -> int:
        """Rows that must be held for a step: room for all k + 1 rows."""
        rows = math.ceil(self.length(step) - _ROUNDING) + self.draft_tokens + 1
        return min(rows, self.limit)

    def first_step_beyond(self, capacity: int, step: int) -> int:
        """The first step from ``step`` on whose `needed` rows exceed ``capacity``; else `steps`."""
        room = capacity - self.prompt_rows - self.draft_tokens - 1
        guess = min(self.steps, max(step, math.floor(room / self.kept_per_step) + 1))
        # Rounding may put the guess a step off; `needed` alone decides, or growths and steps
        # disagree and a caller waits for a growth that never comes.
        while guess > step and self.needed(guess - 1) > capacity:
            guess -= 1
        while guess < self.steps and self.needed(guess) <= capacity:
            guess += 1
        return guess


def tokens_per_step(draft_tokens: int, acceptance: float) -> float:
    """1 + a + ... + a^k: the verified row itself, and every draft token whose forerunners held."""
    return sum(acceptance**i for i in range(draft_tokens + 1))


class Segment(NamedTuple):
    """Steps between two growths: [first_step, end_step), all with room for ``capacity`` rows.

    ``copied``: valid rows that the growth before it copied; None: what the prompt allocated.
    """

    capacity: int
    first_step: int
    end_step: int
    copied: float | None


class Prediction(NamedTuple):
    """What a policy costs on a workload.

    Attributes:
        growths: after the prompt. `copied_rows`: in all of them.
        copy_seconds: growths. `padding_seconds`: attention over spare rows. `read_seconds`:
            attention over valid rows. `step_seconds`: all else.
        mean_spare_rows, most_spare_rows: held and not used, per sequence, over the steps.
    """

    growths: int
    copied_rows: float
    copy_seconds: float
    padding_seconds: float
    read_seconds: float
    step_seconds: float
    mean_spare_rows: float
    most_spare_rows: float

    @property
    def cache_seconds(self) -> float:
        """What depends on the cache: growths, padding, reading."""
        return self.copy_seconds + self.padding_seconds + self.read_seconds

    @property
    def seconds(self) -> float:
        """The whole generation, the prompt's own computation left out."""
        return self.cache_seconds + self.step_seconds


def segments(policy: BMCPolicy, work: Workload, *, know_limit: bool = True) -> Iterator[Segment]:
    """The capacities that ``policy`` gives in turn, from the prompt to the last step.

    Args:
        know_limit: whether the policy is told `Workload.limit`.
    """
    limit = work.limit if know_limit else None

    def hold(held: int, needed: int) -> int:
        rows = policy.rows_to_hold(held, needed, limit)
        return -(-rows // work.row_multiple) * work.row_multiple

    capacity, step, copied = hold(0, work.prompt_rows), 0, None
    steps = work.steps
    while True:
        end = steps if capacity >= work.limit else work.first_step_beyond(capacity, step)
        yield Segment(capacity, step, end, copied)
        if end >= steps:
            return
        step = end
        copied = work.length(step)
        capacity = hold(capacity, work.needed(step))


def predict(
    policy: BMCPolicy, work: Workload, costs: Costs, *, know_limit: bool = True
) -> Prediction:
    """Seconds and spare rows of a generation under ``policy``.

    Exact for the model's assumptions: lengths are averages where draft tokens are accepted by
    chance, all else is integers. Takes time in proportion to the growths, not to the tokens.
    """
    kept, drafts = work.kept_per_step, work.draft_tokens
    growths = 0
    copied = copy_seconds = spare = most = 0.0
    for part in segments(policy, work, know_limit=know_limit):
        if part.copied is not None:
            growths += 1
            copied += part.copied
            copy_seconds += costs.growth_seconds(part.copied)
        count = part.end_step - part.first_step
        if count:
            used = work.length(part.first_step) + drafts + 1
            spare += count * (part.capacity - used) - kept * count * (count - 1) / 2
            most = max(most, part.capacity - used)
    steps = work.steps
    valid = steps * (work.prompt_rows + drafts + 1) + kept * steps * (steps - 1) / 2
    spare = max(0.0, spare)
    return Prediction(
        growths,
        copied,
        copy_seconds,
        costs.c_row * spare,
        costs.c_read * valid,
        steps * costs.step_seconds(work.batch_size * (drafts + 1)),
        spare / steps if steps else 0.0,
        most,
    )


def best_growths(work: Workload, costs: Costs) -> float:
    """T*: growths of the continuous optimum, at least 1.

    T* = N sqrt(c_row / (2 g)), g being the mean of g(n) over [P, P + N]; with draft tokens a spare
    row is attended over in N / kept_per_step steps instead of N, which divides c_row.
    """
    new = work.new_rows
    growth = costs.mean_growth_seconds(work.prompt_rows, work.prompt_rows + new)
    if growth <= 0.0:
        return float(max(1, new))
    return max(1.0, new * math.sqrt(costs.c_row / work.kept_per_step / (2 * growth)))


def best_rows(work: Workload, costs: Costs, *, tolerance: float = TOLERANCE) -> int:
    """r*: the fewest rows per growth whose predicted `cache_seconds` are within ``tolerance`` of
    the least.

    Candidates are the closed form's r, and a geometric grid of r from far below it to all rows;
    each is priced by `predict`. Where padding has a price, ``tolerance`` does not apply: the least
    time wins, ties to the smaller r.
    """
    whole = max(1, work.limit)
    if work.steps == 0:
        return whole
    if costs.c_row > 0.0:
        r = work.new_rows / best_growths(work, costs)
    else:
        r = _free_padding_rows(work.prompt_rows + work.new_rows / 2, costs, tolerance)
    r = min(float(whole), max(1.0, r))
    fewest = int(4 * math.log2(max(1.0, r / 8)))
    grid = (2 ** (i / 4) for i in range(fewest, 4 * whole.bit_length() + 1))
    multiple = work.row_multiple
    candidates = {
        min(whole, -(-math.ceil(rows) // multiple) * multiple) for rows in (math.floor(r), r, *grid)
    }
    priced = [
        (predict(BMCPolicy(r=rows), work, costs).cache_seconds, rows) for rows in sorted(candidates)
    ]
    least = min(priced)[0]
    allowed = least * (1.0 + (0.0 if costs.c_row > 0.0 else tolerance))
    return next(rows for seconds, rows in priced if seconds <= allowed)


def growing_policy(
    costs: Costs, *, prompt_rows: int = 0, tolerance: float = TOLERANCE
) -> BMCPolicy:
    """The policy for an unknown N: r(n) = c sqrt(n), see the module docstring.

    The constants are those of growths at `UNKNOWN_LENGTH_ROWS` rows, or at the prompt's where it is
    longer. Where padding is free, r is constant up to there (the r whose growths cost ``tolerance``
    of what is read) and goes on as sqrt(n).
    """
    rows = max(UNKNOWN_LENGTH_ROWS, prompt_rows)
    growth = costs.growth_seconds(rows)
    if growth <= 0.0:
        return BMCPolicy.growing()
    if costs.c_row > 0.0:
        best = min(math.sqrt(2 * growth / costs.c_row), MAX_RESERVE_ROWS)
        fewest = MINIMUM_GROWTH
    else:
        best = min(_free_padding_rows(rows, costs, tolerance), MAX_RESERVE_ROWS)
        fewest = max(MINIMUM_GROWTH, math.ceil(best))
    return BMCPolicy.growing(c=best / math.sqrt(rows), minimum=fewest)


def best_draft_tokens(
    work: Workload, costs: Costs, *, most: int = 15, spare_rows: int | None = None
) -> int:
    """k: the draft tokens per step, the same for all sequences, that give the most kept rows per
    second at the mean n = P + N/2.

    An estimate before anything runs: acceptance is the same at every position, drafting is free,
    and K and V are read once for all k + 1 rows of a step, as they are where memory binds and
    queries are not grouped. Serving takes nothing of that for granted: see
    `bmc_core.speculation.SpeculationController`.

    Args:
        spare_rows: k + 1 rows must fit into them; None: no bound.
    """
    if spare_rows is not None:
        most = min(most, max(0, spare_rows - 1))
    batch = work.batch_size
    # One request stands for all: its query rows are taken `batch` times.
    alike = StepCosts(
        forward=tuple((rows, costs.step_seconds(batch * rows)) for rows in range(1, most + 2)),
        attention=((1, costs.c_read),),
        draft=(),
    )
    survival = [work.acceptance**position for position in range(1, most + 1)]
    context = work.prompt_rows + work.new_rows // 2
    return choose_lengths([survival], [context], [most], alike, draft_steps=None).lengths[0]


def _free_padding_rows(rows: float, costs: Costs, tolerance: float) -> float:
    """The r whose growths at ``rows`` rows cost ``tolerance`` of what is read between them."""
    read = tolerance * costs.c_read * rows
    return costs.growth_seconds(rows) / read if read > 0.0 else math.inf


def _between(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Linear between the points, and along the first and last pair beyond them."""
    if len(points) == 1:
        return points[0][1]
    place = bisect_left(points, x, key=lambda point: point[0])
    (x0, y0), (x1, y1) = points[max(0, min(place - 1, len(points) - 2)) :][:2]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
