"""Whether the thread binding leaves physical cores idle.

Promises a sentence for the log, naming the setting and the value to use, or None. Knows nothing
of vLLM's configuration beyond the name of that setting.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SETTING = "VLLM_CPU_OMP_THREADS_BIND"
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def physical_cores(cpus: set[int]) -> list[int]:
    """One logical CPU (the lowest) of each physical core in ``cpus``, sorted."""
    cores: dict[str, int] = {}
    for cpu in sorted(cpus):
        try:
            key = Path(_SIBLINGS.format(cpu)).read_text().strip()
        except OSError:
            key = str(cpu)
        cores.setdefault(key, cpu)
    return sorted(cores.values())


def to_list_text(cpus: list[int]) -> str:
    """Sorted CPU ids as text: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for cpu in cpus:
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def idle_core_warning(threads: int, workers: int, parent_pid: int) -> str | None:
    """What to say when ``workers`` local workers of ``threads`` threads leave cores unused.

    The worker's own affinity may already be narrowed by the binding, so the CPUs of its parent
    are counted as well.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    cpus = set(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        cpus |= os.sched_getaffinity(parent_pid)
    cores = physical_cores(cpus)
    idle = len(cores) - threads * workers
    if idle <= 0:
        return None
    share = len(cores) // workers
    lists = [to_list_text(cores[i * share : (i + 1) * share]) for i in range(workers)]
    found = os.environ.get(SETTING, "auto")
    return (
        f"{idle} of {len(cores)} physical cores have no compute thread "
        f"({SETTING}={found}); set {SETTING}={'|'.join(lists)} to use all"
    )
