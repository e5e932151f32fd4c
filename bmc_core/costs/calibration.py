"""Turns what this machine was measured to do into the costs of the model, and "auto" into a policy.

Promises measured figures: from a file that was written for this machine, thread count, dtype, model
geometry and these versions, or measured now (some seconds, once). Without a writable cache
folder everything works, and says once that nothing is kept. Knows no framework.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from bmc_core import native
from bmc_core.costs import cache as files
from bmc_core.costs.geometry import Geometry
from bmc_core.costs.measure import (
    MAX_BYTES,
    NEAR_BYTES,
    AttentionCost,
    Measured,
    Progress,
    measure,
)
from bmc_core.costs.model import Costs, Workload, best_rows, growing_policy
from bmc_core.machine import cpu
from bmc_core.machine.load import BUSY, Neighbors
from bmc_core.machine.memory import huge_pages_setting
from bmc_core.policy import BMCPolicy

logger = logging.getLogger("bmc_core")

Attention = Literal["native", "sdpa", "padded"]
ATTENTIONS: tuple[Attention, ...] = ("native", "sdpa", "padded")
NATIVE_ROW_MULTIPLE = 16


class Calibration(NamedTuple):
    """Figures for one geometry and thread count.

    `path`: the file that keeps them, None where none could be written. `fresh`: measured now.
    """

    geometry: Geometry
    threads: int
    measured: Measured
    path: Path | None
    fresh: bool

    def costs(self, attention: Attention, batch_size: int, rows: int | None = None) -> Costs:
        """Seconds for all layers and sequences of a batch.

        Args:
            attention: which path is priced. "native": the kernel over packed rows; it skips spare
                rows, c_row = 0. "sdpa": torch's over views of the valid rows, as `BMCCache` hands
                them out; c_row = 0 too. "padded": torch's over every row that is held, with a
                mask: the paper's own scheme.
            batch_size: sequences, beams included.
            rows: that a sequence will have, about: the K and V of few rows stay in caches and are
                read faster. None: many.

        Raises:
            ValueError: another path, no sequence, or "native" where the kernel cannot be used.
        """
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r}: allowed are {', '.join(ATTENTIONS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected an int >= 1")
        measured = self.measured
        growth = measured.growth_packed if attention == "native" else measured.growth_rows
        near_and_far = getattr(measured, attention)
        if growth is None or near_and_far is None:
            raise ValueError(
                'attention="native": the kernel cannot be used for this geometry here; '
                'allowed: "sdpa"'
            )
        layers = self.geometry.num_layers
        row_bytes = batch_size * self.geometry.layer_row_bytes
        cost = between(near_and_far, None if rows is None else rows * layers * row_bytes)
        curve = tuple((size / row_bytes, layers * seconds) for size, seconds in growth)
        most_rows, most_seconds = curve[-1]
        per_row = layers * row_bytes
        return Costs(
            c_copy=most_seconds / most_rows,
            c_row=cost.padding * per_row if attention == "padded" else 0.0,
            c_read=cost.valid * per_row,
            c_alloc=curve[0][1],
            growth_curve=curve,
            step_curve=tuple(
                (float(count), taken + layers * cost.call) for count, taken in measured.steps
            ),
        )


def between(costs: tuple[AttentionCost, AttentionCost], num_bytes: int | None) -> AttentionCost:
    """Attention over so many bytes of K and V in all layers: linear in the logarithm between the
    two working sets that were measured. None: far."""
    near, far = costs
    if num_bytes is None or num_bytes >= MAX_BYTES:
        return far
    share = math.log(max(1.0, num_bytes / NEAR_BYTES)) / math.log(MAX_BYTES / NEAR_BYTES)
    return AttentionCost(*(a + share * (b - a) for a, b in zip(near, far, strict=True)))


@functools.cache
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bmc-llm")
    except PackageNotFoundError:
        return "unknown"


def key_of(geometry: Geometry, threads: int) -> dict[str, Any]:
    """All that the figures depend on, as plain data."""
    loaded = native.load_error() is None
    return {
        "node": platform.node(),
        "processor": cpu.model_name(),
        "cores": cpu.num_cores(),
        "kernel": platform.release(),
        "huge_pages": huge_pages_setting(),
        "allocator": os.environ.get("LD_PRELOAD", ""),
        "threads": threads,
        "geometry": {
            **{name: getattr(geometry, name) for name in geometry.__dataclass_fields__},
            "dtype": str(geometry.dtype),
        },
        "bmc": _version(),
        "torch": torch.__version__,
        "isa": native.isa() if loaded else "none",
    }


_known: dict[str, Calibration] = {}
_failed: set[Geometry] = set()


def calibrate(
    geometry: Geometry,
    *,
    threads: int | None = None,
    refresh: bool = False,
    seconds: float = 5.0,
    progress: Progress | None = None,
) -> Calibration:
    """This machine's figures for a geometry.

    Args:
        threads: torch's threads; None: as many as it has now.
        refresh: measure although there are figures.
        seconds: time budget of a measurement.
        progress: is told what is measured and the fraction done.

    Raises:
        ValueError: threads is not positive.
        RuntimeError, MemoryError: there is no memory to measure with.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: expected an int >= 1")
    threads = threads or torch.get_num_threads()
    key = key_of(geometry, threads)
    name = files.digest(key)
    if not refresh and name in _known:
        return _known[name]
    measured, reason = (None, "a new measurement was asked for") if refresh else files.load(key)
    path: Path | None = None
    fresh = measured is None
    if measured is not None:
        path = files.path_of(key)
    else:
        logger.warning(
            "bmc_core: measuring this machine, once, about %.0f seconds: %s", 1.4 * seconds, reason
        )
        neighbors = Neighbors()
        told = {"progress": progress} if progress else {}
        with on_threads(threads):
            measured = measure(geometry, seconds=seconds, **told)
        others = neighbors.share()
        if others is not None and others > BUSY:
            logger.warning(
                "bmc_core: other processes took %.0f%% of the cores while this machine was "
                "measured; for better figures, on an idle machine: %s",
                100 * others,
                "python -m bmc_core calibrate --refresh",
            )
        try:
            path = files.save(key, measured)
        except OSError as error:
            logger.warning("bmc_core: the measured costs are not kept: %s", error)
    found = Calibration(geometry, threads, measured, path, fresh)
    _known[name] = found._replace(fresh=False)
    return found


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """torch's threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=1024)
def choose_policy(costs: Costs, work: Workload, know_length: bool) -> BMCPolicy:
    """The policy for known costs: `best_rows` of a known length, else a growing one."""
    if not know_length:
        return growing_policy(costs, prompt_rows=work.prompt_rows)
    return BMCPolicy(r=best_rows(work, costs))


def auto_policy(
    geometry: Geometry,
    *,
    batch_size: int,
    prompt_rows: int,
    total_rows: int | None,
    attention: Attention,
    draft_tokens: int = 0,
    progress: Progress | None = None,
) -> BMCPolicy:
    """A concrete policy for this machine, which is measured first if it never was (logged once).

    Args:
        batch_size: sequences, beams included.
        prompt_rows: 0 where not known.
        total_rows: rows at the end, prompt included; None: not known, the policy is a growing one.
        attention: the path that is priced, see `Calibration.costs`; "native" falls back to "sdpa"
            where the kernel cannot be used.
        draft_tokens: a step verifies one row more than that.
        progress: is told what is measured.

    Raises:
        ValueError: an argument out of range. Where measuring fails, no error: the policy is
            ``BMCPolicy.growing()``, and one log line says why.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention={attention!r}: allowed are {', '.join(ATTENTIONS)}")
    new_rows = 0 if total_rows is None else max(0, total_rows - prompt_rows)
    multiple = NATIVE_ROW_MULTIPLE if attention == "native" else 1
    work = Workload(
        prompt_rows, new_rows, batch_size, draft_tokens=draft_tokens, row_multiple=multiple
    )
    if geometry in _failed:
        return BMCPolicy.growing()
    try:
        found = calibrate(geometry, progress=progress)
    except (MemoryError, OSError, RuntimeError) as error:
        # Not tried again in this process: it would cost every later generation some seconds.
        _failed.add(geometry)
        logger.warning("bmc_core: no calibration, the cache grows by default: %s", error)
        return BMCPolicy.growing()
    if attention == "native" and found.measured.native is None:
        attention = "sdpa"
    rows = None if total_rows is None else max(prompt_rows, total_rows)
    costs = found.costs(attention, batch_size, rows)
    return choose_policy(costs, work, total_rows is not None)
