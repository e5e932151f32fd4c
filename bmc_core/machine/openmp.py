"""The OpenMP runtimes of this process: two of them on the same cores stall each other."""

from __future__ import annotations

import ctypes
from pathlib import Path

_NAMES = ("libgomp", "libiomp", "libomp")
_ENTRY = "GOMP_parallel"
"""Where compiled code, ours too, enters a parallel region; Intel's runtime serves it as well."""


class _Symbol(ctypes.Structure):
    """What `dladdr` says of an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def runtimes() -> tuple[str, ...]:
    """File names of the OpenMP runtimes that are loaded now; more than one is a fault, unless one
    of them is preloaded and serves all (`serving`)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except (OSError, ValueError):
        return ()
    files = {Path(fields[5]).name for line in lines if len(fields := line.split(None, 5)) == 6}
    return tuple(sorted(name for name in files if name.startswith(_NAMES)))


def serving() -> str | None:
    """File name of the runtime that runs the parallel regions of code compiled for libgomp, as
    ours is; None where there is none, or where that cannot be told."""
    found = _Symbol()
    try:
        process = ctypes.CDLL(None)
        entry = ctypes.cast(getattr(process, _ENTRY), ctypes.c_void_p)
        if not process.dladdr(entry, ctypes.byref(found)) or not found.file:
            return None
    except (AttributeError, OSError):
        # Loaded for its users only: then it is theirs, where it is the only one.
        loaded = runtimes()
        return loaded[0] if len(loaded) == 1 else None
    return Path(found.file.decode(errors="replace")).name
