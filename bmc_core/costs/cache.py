"""Keeps measured costs in the user's cache folder, one file per machine, threads and geometry.

Promises that what `load` returns was written by the same version of this code for the very same
key, not long ago, and has only figures of the right form and within `LEAST` and `MOST`; anything
else, whatever lies in the file's place, is None with a reason, at once. A file is replaced as a
whole or not at all. Knows nothing of how costs are measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
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
CLOCK_SKEW_SECONDS = 3600.0
"""A clock that was put right meanwhile, or another machine's, may be behind a file by so much."""
MAX_FILE_BYTES = 1 << 20
"""A hundred times what `save` writes."""
LEAST, MOST = 1e-18, 1e15
"""Of every figure that is not 0, in seconds, rows or bytes: far beyond any machine, and near enough
that no product of figures leaves the range of a float."""

Key = Mapping[str, Any]


def folder() -> Path:
    """Where the files are: `bmc-llm/calibration` in the user's cache folder (XDG_CACHE_HOME).

    Raises:
        FileNotFoundError: there is none, for a user without a home.
    """
    import platformdirs

    try:
        return platformdirs.user_cache_path("bmc-llm") / "calibration"
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no cache folder for this user ({error}); allowed: an absolute path in "
            "XDG_CACHE_HOME or HOME"
        ) from error


def digest(key: Key) -> str:
    """A name for a key (plain data), the same for the same one."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


def path_of(key: Key) -> Path:
    """The file for a key; raises as `folder`."""
    return folder() / f"{digest(key)}.json"


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
    try:
        path = path_of(key)
    except FileNotFoundError as error:
        return None, str(error)
    try:
        return _measured(json.loads(_text(path)), key), f"from {path}"
    except FileNotFoundError:
        return None, "nothing was measured yet"
    except OSError as error:
        return None, f"{path} cannot be read ({error})"
    except (ValueError, RecursionError) as error:
        return None, f"{path} is not valid ({error})"


def _text(path: Path) -> bytes:
    """What a file holds; waits for nobody to write it."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has {status.st_size} bytes")
        with open(handle, "rb", closefd=False) as file:
            return file.read(MAX_FILE_BYTES)
    finally:
        os.close(handle)


def _measured(document: Any, key: Key) -> Measured:
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"schema is not {SCHEMA}")
    if document.get("key") != json.loads(json.dumps(dict(key))):
        raise ValueError("it is for another machine, version or geometry")
    age = time.time() - _number(document.get("created"), "created")
    if not -CLOCK_SKEW_SECONDS <= age <= MAX_AGE_SECONDS:
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
        _steps(fields["steps"]),
    )


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is no number")
    # Compared, not converted: an int may be too large for a float.
    if not (value == 0 or LEAST <= value <= MOST):
        raise ValueError(f"{name} is neither 0 nor between {LEAST} and {MOST}")
    return float(value)


def _curve(value: Any, name: str) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is no list of points")
    points: list[tuple[float, float]] = []
    for point in value:
        if not isinstance(point, list) or len(point) != 2:
            raise ValueError(f"{name} has something else than points")
        x, y = _number(point[0], name), _number(point[1], name)
        if x == 0.0 or y == 0.0 or (points and x <= points[-1][0]):
            raise ValueError(f"{name} has a point of no size or no time, or does not rise")
        points.append((x, y))
    return tuple(points)


def _steps(value: Any) -> tuple[tuple[int, float], ...]:
    points = _curve(value, "steps")
    for rows, _ in points:
        if not rows.is_integer():
            raise ValueError(f"steps has a point at {rows} rows")
    return tuple((int(rows), seconds) for rows, seconds in points)


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
