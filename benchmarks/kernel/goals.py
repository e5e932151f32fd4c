"""How each kind of goal of the kernel benchmark is computed from its rows.

Promises that a goal beyond the floor of its case is found out. Knows nothing of how rows are
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernel.rows import Row
from benchmarks.lib.goals import Goal, Verdict, holding, load
from benchmarks.lib.instruction_sets import InstructionSets

GOALS = load(Path(__file__).with_name("goals.toml"))
OURS = "bmc"
EFFICIENT_READ_SHARE = 0.85
"""From this share of the read bandwidth on, more threads need not be faster."""


class Comparison(NamedTuple):
    """An operator on the cases of one group: median and smallest times in the order of the
    cases."""

    group: str
    title: str
    names: list[str]
    ms: list[float]
    best: list[float]
    system: str = OURS

    @property
    def spread(self) -> float:
        """Largest over smallest time, less 1."""
        return max(self.ms) / min(self.ms) - 1

    @property
    def best_spread(self) -> float:
        """The same of the smallest times: what is left of it where others use the machine."""
        return max(self.best) / min(self.best) - 1


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """One comparison per group and operator, in the order of the rows."""
    found: dict[tuple[str, str], Comparison] = {}
    for row in rows:
        if not row.case.group:
            continue
        key = (row.case.group, row.title)
        comparison = found.setdefault(key, Comparison(*key, [], [], [], row.system))
        comparison.names.append(row.case.name)
        comparison.ms.append(row.timing.ms)
        comparison.best.append(row.timing.best)
    return list(found.values())


def judge(
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    isas: InstructionSets,
    goals: Sequence[Goal],
) -> list[Verdict]:
    """Every goal that holds for both sides' instruction sets; without a value where BMC was not
    timed on its case or group, or in few calls only."""
    ours = {row.case.name: row for row in rows if row.system == OURS and row.timing.told}
    groups = {
        c.group: c for c in comparisons if c.system == OURS and all(n in ours for n in c.names)
    }
    verdicts: list[Verdict] = []
    for goal in holding(goals, isas):
        if goal.metric == "spread" and goal.case in groups:
            verdicts.append(Verdict(goal.case, goal, groups[goal.case].spread))
        elif goal.metric == "efficiency":
            verdicts += _efficiencies(goal, ours) or [Verdict(goal.case, goal, None)]
        elif goal.case in ours:
            row = ours[goal.case]
            verdicts.append(
                Verdict(
                    goal.case,
                    goal,
                    _value(goal, row, row.timing.ms, ours),
                    _value(goal, row, row.floor.ms, ours) if row.case.flops else None,
                    row.floor.told,
                )
            )
        else:
            verdicts.append(Verdict(goal.case, goal, None))
    return verdicts


def _value(goal: Goal, row: Row, ms: float, ours: dict[str, Row]) -> float | None:
    """The goal's figure if BMC's time on the case were `ms`."""
    if goal.metric == "read_share":
        return row.case.kv_bytes / ms / 1e6 / row.read_gb_s
    if goal.metric == "gflops":
        return row.case.flops / ms / 1e6
    if goal.metric == "ratio":
        ratio = row.ratios.get(goal.against)
        return None if ratio is None else ratio * row.timing.ms / ms
    if goal.metric == "cost":
        other = ours.get(goal.against)
        return None if other is None else ms / other.timing.ms
    if goal.metric == "parts":
        parts = [r for r in ours.values() if r.case.group == row.case.group and r is not row]
        return ms / sum(r.timing.ms for r in parts) if parts else None
    raise ValueError(f"metric {goal.metric!r} of {goal.case}: the kernel benchmark has none such")


def _efficiencies(goal: Goal, ours: dict[str, Row]) -> list[Verdict]:
    """Of each number of threads in the goal's group, beside one thread."""
    rows = [row for row in ours.values() if row.case.group == goal.case]
    alone = next((row for row in rows if row.threads == 1), None)
    verdicts = []
    for row in rows:
        if row.threads == 1:
            continue
        value = None if alone is None else alone.timing.ms / (row.threads * row.timing.ms)
        full = row.case.reads_bound and row.gb_s / row.read_gb_s >= EFFICIENT_READ_SHARE
        verdicts.append(Verdict(row.case.name, goal, value, saturated=full))
    return verdicts
