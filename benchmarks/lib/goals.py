"""Goals: figures that should be reached, as data with their source, and what came of them.

A command's `goals.toml` begins with the table `[metrics]`: the kinds of figures that it states
goals for, and how such a goal reads ({sign}, {bound} and {against} are filled in). Then tables
`[[set]]`, each one claim from one place:

    ours, theirs   instruction sets of both sides that it holds for, the first of one list with the
                   first of the other; left out: any
    source         where the figures are from
    goals          [{case, metric, at_least or at_most, against (for some metrics), system}]

Promises that a goal is only held against a machine whose two sides use the instruction sets that
it was stated for, and that one beyond what the machine can do is marked as such. Knows nothing of
how a figure is measured.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.lib.instruction_sets import InstructionSets
from bmc_core.machine.load import BUSY


@dataclass(frozen=True)
class Goal:
    """A figure that a system should reach on a case.

    Attributes:
        case: name of a case, or of a group of cases.
        metric: the kind of figure, a key of the file's `[metrics]`.
        bound: the figure.
        at_most: whether less is better.
        against: the peer of a ratio, the case of a cost.
        system: whose figure it is.
        ours, theirs: instruction sets of both sides that it holds for, in pairs; empty: any.
        source: where the figure is from.
        wording: how a goal of this metric reads.
    """

    case: str
    metric: str
    bound: float
    at_most: bool = False
    against: str = ""
    system: str = "bmc"
    ours: tuple[str, ...] = ()
    theirs: tuple[str, ...] = ()
    source: str = ""
    wording: str = "{sign} {bound:.3g}"

    def holds_for(self, isas: InstructionSets) -> bool:
        if self.ours and self.theirs:
            return (isas.ours, isas.theirs) in zip(self.ours, self.theirs, strict=True)
        ours = not self.ours or isas.ours in self.ours
        return ours and (not self.theirs or isas.theirs in self.theirs)

    def met_by(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return self.wording.format(sign=sign, bound=self.bound, against=self.against)


class Verdict(NamedTuple):
    """A goal held against a run.

    Attributes:
        case: name, more exact than the goal's where that holds for several.
        value: measured; None: it was not.
        at_floor: the best value that the floor leaves here; None: the floor says nothing of it.
        floor_told: whether the floor is known; a disturbed one is too high.
        saturated: whether the machine is used to the full, so that no more than the value is asked.
    """

    case: str
    goal: Goal
    value: float | None
    at_floor: float | None = None
    floor_told: bool = True
    saturated: bool = False

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.saturated or self.goal.met_by(self.value)

    @property
    def below_floor(self) -> bool:
        """Whether no code whatever could meet it here; never where the floor is not told."""
        return self.floor_told and self._beyond

    @property
    def doubtful(self) -> bool:
        """Whether it would be below a floor that is not told."""
        return not self.floor_told and self._beyond

    @property
    def _beyond(self) -> bool:
        return self.at_floor is not None and not self.goal.met_by(self.at_floor)


def load(path: Path) -> list[Goal]:
    """The goals of a file.

    Raises:
        ValueError: something in it is not as the module docstring says.
    """
    document = tomllib.loads(path.read_text())
    metrics = document.get("metrics", {})
    goals = []
    for claim in document["set"]:
        unknown = set(claim) - {"ours", "theirs", "source", "goals"}
        if unknown or not claim.get("source"):
            raise ValueError(
                f"{path.name}: a set has {sorted(claim)}; allowed: ours, theirs, "
                "source (never empty) and goals"
            )
        ours, theirs = claim.get("ours", ()), claim.get("theirs", ())
        if ours and theirs and len(ours) != len(theirs):
            raise ValueError(
                f"{path.name}: ours is {ours} and theirs {theirs}; allowed: pairs, as many in both"
            )
        shared = {
            "ours": tuple(claim.get("ours", ())),
            "theirs": tuple(claim.get("theirs", ())),
            "source": " ".join(claim["source"].split()),
        }
        goals += [_goal(dict(fields), shared, metrics, path.name) for fields in claim["goals"]]
    return goals


def _goal(
    fields: dict[str, Any], shared: dict[str, Any], metrics: dict[str, str], file: str
) -> Goal:
    if fields.get("metric") not in metrics:
        raise ValueError(f"{file}: metric is {fields.get('metric')!r}; allowed: {list(metrics)}")
    fields["wording"] = metrics[fields["metric"]]
    bounds = {name: fields.pop(name) for name in ("at_least", "at_most") if name in fields}
    if len(bounds) != 1:
        raise ValueError(f"{file}: {fields} has {list(bounds)}; allowed: at_least or at_most")
    ((name, bound),) = bounds.items()
    try:
        return Goal(**fields, bound=float(bound), at_most=name == "at_most", **shared)
    except TypeError as error:
        raise ValueError(f"{file}: {fields}: {error}") from None


def holding(goals: Iterable[Goal], isas: InstructionSets) -> list[Goal]:
    """Those for a machine."""
    return [goal for goal in goals if goal.holds_for(isas)]


def under_load(verdicts: Iterable[Verdict], others: float | None) -> list[Verdict]:
    """The verdicts of a run in which other processes took `others` of the cores (None: not told):
    from `BUSY` on, ceilings are too low and floors too high to say what no code could reach."""
    disturbed = others is not None and others > BUSY
    return [v._replace(floor_told=v.floor_told and not disturbed) for v in verdicts]


def document(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """[{case, goal, system, metric, bound, at_most, against, ours, theirs, source, value,
    at_floor, floor_told, saturated, below_floor, met}]"""
    return [
        {
            "case": verdict.case,
            "goal": str(verdict.goal),
            **{
                name: getattr(verdict.goal, name)
                for name in ("system", "metric", "bound", "at_most", "against")
            },
            **{name: getattr(verdict.goal, name) for name in ("ours", "theirs", "source")},
            "value": verdict.value,
            "at_floor": verdict.at_floor,
            "floor_told": verdict.floor_told,
            "saturated": verdict.saturated,
            "below_floor": verdict.below_floor,
            "met": verdict.met,
        }
        for verdict in verdicts
    ]


def _mark(verdict: Verdict) -> str:
    if verdict.below_floor and not verdict.met:
        return f"[red]below the floor here: {verdict.at_floor:.3g} at best[/]"
    if verdict.doubtful and verdict.met is False:
        return "[yellow]not met[/], the floor here is not told"
    return {True: "[green]met[/]", False: "[yellow]not met[/]", None: "not measured"}[verdict.met]


def show(verdicts: Sequence[Verdict], isas: InstructionSets, console: Console) -> None:
    """A line per goal, then where they are from."""
    if not verdicts:
        console.print(f"No goals are stated for {isas}.", highlight=False)
        return
    table = Table(box=box.SIMPLE_HEAD, title=f"Goals for {isas}", title_justify="left")
    for name in ("case", "system", "goal"):
        table.add_column(name)
    table.add_column("measured", justify="right")
    for name in ("", "source"):
        table.add_column(name)
    sources = list(dict.fromkeys(verdict.goal.source for verdict in verdicts))
    for verdict in verdicts:
        goal = verdict.goal
        value = "" if verdict.value is None else f"{verdict.value:.3g}"
        number = f"({sources.index(goal.source) + 1})"
        table.add_row(escape(verdict.case), goal.system, str(goal), value, _mark(verdict), number)
    console.print(table)
    for place, source in enumerate(sources, 1):
        console.print(f"  ({place}) {source}", highlight=False, markup=False)
