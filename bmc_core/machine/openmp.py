"""The OpenMP runtimes of this process: two of them on the same cores stall each other."""

from __future__ import annotations

from pathlib import Path

_NAMES = ("libgomp", "libiomp", "libomp")


def runtimes() -> tuple[str, ...]:
    """File names of the OpenMP runtimes that are loaded now; more than one is a fault."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except (OSError, ValueError):
        return ()
    files = {Path(fields[5]).name for line in lines if len(fields := line.split(None, 5)) == 6}
    return tuple(sorted(name for name in files if name.startswith(_NAMES)))
