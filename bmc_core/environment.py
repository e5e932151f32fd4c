"""What a bug report needs: versions, this machine, the kernels, the frameworks beside us.

Promises an answer in an environment without any framework, and never an exception: what cannot be
found out says why. Knows no framework: each integration tells about itself through the entry point
group `FRAMEWORKS`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bmc_core.machine import cpu, memory, openmp

FRAMEWORKS = "bmc_core.frameworks"
"""Entry points: name of a framework -> a function without arguments that returns a `Framework`."""

VARIABLES = (
    "BMC_ISA",
    "DNNL_",
    "DS_ACCELERATOR",
    "GLIBC_TUNABLES",
    "GOMP_",
    "KMP_",
    "LD_PRELOAD",
    "MALLOC_",
    "MKL_",
    "OMP_",
    "ONEDNN_",
    "VLLM_CPU_",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_PLUGINS",
    "VLLM_TARGET_DEVICE",
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_WORKER_MULTIPROC_METHOD",
)
"""Beginnings of the environment variables that decide what runs where. No others are shown: the
report is meant for a public issue, and addresses and keys are in other variables."""


class Framework(NamedTuple):
    """What an integration says of its framework.

    Attributes:
        version: None: not installed.
        tested: the versions that this package is tested with.
        steps_aside: why BMC cannot be used there; None: it can.
    """

    version: str | None
    tested: str
    steps_aside: str | None = None

    def __str__(self) -> str:
        if self.version is None:
            return f"not installed (tested: {self.tested})"
        if self.steps_aside is None:
            return f"{self.version}: takes part (tested: {self.tested})"
        return f"{self.version}: steps aside: {self.steps_aside}"


def version(*distributions: str) -> str | None:
    """Version of the first of the distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def report() -> dict[str, dict[str, str]]:
    """Sections, each a table of names and sentences."""
    sections: dict[str, Callable[[], Mapping[str, str]]] = {
        "versions": _versions,
        "machine": _machine,
        "frameworks": _frameworks,
        # After the frameworks: what they have loaded is loaded now.
        "kernels": _kernels,
        "variables": _variables,
    }
    found = {}
    for name, section in sections.items():
        try:
            found[name] = dict(section())
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found


def as_text(found: Mapping[str, Mapping[str, str]]) -> str:
    """The report as plain lines, to be pasted into an issue."""
    width = max(len(name) for rows in found.values() for name in rows) + 2
    lines = []
    for section, rows in found.items():
        lines.append(section)
        lines += [f"  {name:<{width}}{text}" for name, text in rows.items()] or ["  none"]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    return {
        "bmc-llm": version("bmc-llm") or "not installed: run from its folder",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": _of_torch("__version__"),
        "numpy": version("numpy") or "none",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _machine() -> dict[str, str]:
    allowed = cpu.allowed_cpus()
    cores = cpu.physical_cores(allowed)
    l3 = cpu.l3_bytes()
    pages = memory.huge_page_bytes()
    return {
        "processor": cpu.model_name(),
        "instruction sets": ", ".join(cpu.instruction_sets()) or "unknown",
        "CPUs": f"{cpu.to_list_text(allowed)} of {os.cpu_count()} ({len(cores)} physical cores)",
        "L3 cache": "unknown" if l3 is None else f"{l3 / 2**20:.0f} MiB",
        "free memory": f"{memory.available_bytes() / 2**30:.1f} GiB, control groups considered",
        "huge pages": (
            f"{memory.huge_pages_setting()}, {pages >> 20} MiB" if pages else "none in this kernel"
        ),
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()),
    }


def _kernels() -> dict[str, str]:
    from bmc_core import native

    runtimes = openmp.runtimes()
    warning = "; more than one: threads stall each other" if len(runtimes) > 1 else ""
    found = {
        "torch's threads": _of_torch("get_num_threads"),
        "OpenMP runtimes": (", ".join(runtimes) or "none") + warning,
    }
    try:
        error = native.load_error()
    except ImportError as missing:  # torch itself
        error = f"does not load: {missing}"
    if error is not None:
        return {"native module": error, **found}
    forced = f" (forced by {native.ISA_VARIABLE})" if os.environ.get(native.ISA_VARIABLE) else ""
    return {
        "native module": "loaded",
        "instruction set": native.isa() + forced,
        "usable": ", ".join(native.usable_isas()),
        "threads": str(native.num_threads()),
        **found,
    }


def _frameworks() -> dict[str, str]:
    found = {}
    for point in sorted(importlib.metadata.entry_points(group=FRAMEWORKS), key=lambda p: p.name):
        try:
            # What a framework prints while it is imported is not part of the report.
            with contextlib.redirect_stdout(sys.stderr):
                status: Any = point.load()()
        except ModuleNotFoundError as error:
            missing = f"no module named {error.name}"
            absent = error.name == point.name and version(point.name) is None
            status = f"not installed ({missing})" if absent else f"cannot be imported: {missing}"
        except Exception as error:
            status = f"{type(error).__name__}: {error}"
        found[point.name] = str(status)
    return found


def _variables() -> dict[str, str]:
    return {
        name: _without_folders(value)
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES)
    }


def _without_folders(value: str) -> str:
    """Of paths their last parts: folders have names of people."""
    if "/" not in value:
        return value
    return ":".join(part.rpartition("/")[2] for part in value.replace(" ", ":").split(":"))


def _of_torch(name: str) -> str:
    """An attribute of torch, called where it is a function; or why there is none."""
    try:
        value = getattr(importlib.import_module("torch"), name)
    except Exception as error:
        return f"cannot be imported: {error}"
    return str(value() if callable(value) else value)
