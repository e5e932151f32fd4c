"""Whether the thread binding leaves physical cores idle.

Promises a sentence for the log, naming the setting and the value to use, or None. Knows nothing
of vLLM's configuration beyond the name of that setting.
"""

from __future__ import annotations

import contextlib
import os

from bmc_core.machine.cpu import physical_cores, to_list_text

SETTING = "VLLM_CPU_OMP_THREADS_BIND"


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
