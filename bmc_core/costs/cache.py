"""Keeps measured costs in the user's cache folder, one file per machine, threads and geometry.

Promises that what `load` returns was written by the same version of this code for the very same
key, not long ago, and has only finite, non-negative figures of the right form; anything else is
None with a reason. A file is replaced as a whole or not at all. Knows nothing of how costs are
measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmc_core.costs.measure import AttentionCost, Measured

SCHEMA = 3
"""Of the file, and of what its figures mean: changed with either."""
MAX_AGE_SECONDS = 90 * 24 * 3600.0
"""Kernels and firmware are updated: what is older is measured again."""

Key = Mapping[str, Any]


def folder() -> Path:
    """Where the files are: `bmc-llm/calibration` in the user's cache folder (XDG_CACHE_HOME)."""
    import platformdirs

    return platformdirs.user_cache_path("bmc-llm") / "calibration"


def path_of(key: Key) -> Path:
    """The file for a key (plain data)."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder() / f"{digest[:20]}.json"


def save(key: Key, measured: Measured) -> Path:
    """Writes the figures.

    Raises:
        OSError: the folder or the file cannot be written. What was there before is still there.
    """
    path = path_of(key)
    document = {
        "schema": SCHEMA,
        "created": time.time(),
        "key": dict(key),
        "measured": measured._asdict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def load(key: Key) -> tuple[Measured | None, str]:
    """The figures for a key, or None and the reason (for a log line)."""
    path = path_of(key)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, "nothing was measured yet"
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{path} cannot be read ({error})"
    try:
        return _measured(json.loads(text), key), f"from {path}"
    except (ValueError, RecursionError) as error:
        return None, f"{path} is not valid ({error})"


def _measured(document: Any, key: Key) -> Measured:
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"schema is not {SCHEMA}")
    if document.get("key") != json.loads(json.dumps(dict(key))):
        raise ValueError("it is for another machine, version or geometry")
    age = time.time() - _number(document.get("created"), "created")
    if not 0.0 <= age <= MAX_AGE_SECONDS:
        raise ValueError(f"it is {age / 86400:.0f} days old")
    fields = document.get("measured")
    if not isinstance(fields, dict) or set(fields) != set(Measured._fields):
        raise ValueError("fields are missing or unknown")
    packed, native = fields["growth_packed"], fields["native"]
    if (packed is None) != (native is None):
        raise ValueError("only one of growth_packed and native is there")
    return Measured(
        _curve(fields["growth_rows"], "growth_rows"),
        None if packed is None else _curve(packed, "growth_packed"),
        _near_and_far(fields["sdpa"], "sdpa"),
        _near_and_far(fields["padded"], "padded"),
        None if native is None else _near_and_far(native, "native"),
        tuple((int(rows), seconds) for rows, seconds in _curve(fields["steps"], "steps")),
    )


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is no number")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}")
    return float(value)


def _curve(value: Any, name: str) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is no list of points")
    points: list[tuple[float, float]] = []
    for point in value:
        if not isinstance(point, list) or len(point) != 2:
            raise ValueError(f"{name} has something else than points")
        x, y = _number(point[0], name), _number(point[1], name)
        if y == 0.0 or (points and x <= points[-1][0]):
            raise ValueError(f"{name} has a point that takes no time or does not rise")
        points.append((x, y))
    return tuple(points)


def _near_and_far(value: Any, name: str) -> tuple[AttentionCost, AttentionCost]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name} is no pair of costs")
    return _attention(value[0], name), _attention(value[1], name)


def _attention(value: Any, name: str) -> AttentionCost:
    if not isinstance(value, list) or len(value) != len(AttentionCost._fields):
        raise ValueError(f"{name} is no list of {len(AttentionCost._fields)} numbers")
    cost = AttentionCost(*(_number(item, name) for item in value))
    if cost.valid == 0.0:
        raise ValueError(f"{name} has rows that take no time")
    return cost
