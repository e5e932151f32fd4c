"""The processor: its name, its instruction sets, its caches, and the cores this process may use.

Promises what the system says, and a plain fallback where it says nothing. Knows nothing of which
instruction set a kernel takes: that is `bmc_core.native`'s.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx512_vbmi": "avx512_vbmi",
    "amx_tile": "amx",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "sve": "sve",
}
"""The kernel's names of what matters to matrix products, and the names used here."""


def _cpuinfo(field: str) -> str | None:
    try:
        for line in CPUINFO.read_text().splitlines():
            if line.partition(":")[0].strip() == field:
                return line.partition(":")[2].strip()
    except (OSError, ValueError):
        pass
    return None


def model_name() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Those of `INSTRUCTION_SETS` that the processor has; empty where the system does not tell."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in flags)


def allowed_cpus() -> list[int]:
    """Logical CPUs that this process may run on, sorted."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def num_cores() -> int:
    """How many threads can run at the same time: the size of the affinity mask."""
    return len(allowed_cpus())


def physical_cores(cpus: Iterable[int]) -> list[int]:
    """One logical CPU (the lowest) of each physical core in ``cpus``, sorted."""
    cores: dict[str, int] = {}
    for cpu in sorted(cpus):
        try:
            key = (CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except (OSError, ValueError):
            key = str(cpu)
        cores.setdefault(key, cpu)
    return sorted(cores.values())


def to_list_text(cpus: Iterable[int]) -> str:
    """CPU ids as the kernel and vLLM write them: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def l3_bytes() -> int | None:
    """Sum of the distinct L3 caches of the CPUs in the affinity mask; None where not told."""
    caches: dict[str, int] = {}
    for cpu in allowed_cpus():
        for index in sorted((CPUS / f"cpu{cpu}" / "cache").glob("index*")):
            try:
                if (index / "level").read_text().strip() != "3":
                    continue
                size = (index / "size").read_text().strip()
                shared = (index / "shared_cpu_list").read_text().strip()
                caches[shared] = int(size.rstrip("KMG")) * _UNITS.get(size[-1], 1)
            except (OSError, ValueError):
                continue
    return sum(caches.values()) or None
