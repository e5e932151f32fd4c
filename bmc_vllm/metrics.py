"""Counters of BMC in vLLM's Prometheus ``/metrics``.

The numbers arise in the scheduler's and the workers' processes, ``/metrics`` is answered by the
API server's. vLLM's own channel between them carries a fixed set of fields, and its plugin group
for stat loggers would change stock behavior wherever this package is installed. So the three
share one small file: the front-end process creates it while vLLM's configuration is checked and
hands its name down in the environment; writers store plain 8-byte integers; the collector reads
them when it is asked.

Promises: without BMC selected no file, no variable and no collector exist. A writer without a
file (another host, a full disk) stays silent. Not exported with several API servers
(``--api-server-count`` above 1), where Prometheus runs in its multi-process mode.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from vllm.config import VllmConfig

    from bmc_vllm.kv_cache_manager import GrowthStats

ENV_STATS_FILE = "BMC_VLLM_STATS_FILE"
"""Set by the front-end process for its children; not for users."""

MAX_ENGINES = 16
MAX_RANKS = 32

# One row of int64 per engine: active, growths, rows reserved, rows spare, then per rank the
# bytes of the pool and the bytes of it that are resident.
_ACTIVE, _GROWTHS, _RESERVED, _SPARE, _RANKS = range(5)
_SHAPE = (MAX_ENGINES, _RANKS + 2 * MAX_RANKS)

_collector: _Collector | None = None


def _open(path: str) -> np.memmap:
    return np.memmap(path, dtype=np.int64, mode="r+", shape=_SHAPE)


class StatsWriter:
    """Writes one engine's numbers; does nothing where there is no file to write to."""

    def __init__(self, engine_index: int) -> None:
        self._row: np.ndarray | None = None
        path = os.environ.get(ENV_STATS_FILE)
        if path and 0 <= engine_index < MAX_ENGINES:
            with contextlib.suppress(OSError, ValueError):
                self._row = _open(path)[engine_index]

    def reset_scheduler(self) -> None:
        """Starts the scheduler's numbers at zero and makes the engine visible."""
        if self._row is not None:
            self._row[:_RANKS] = 0
            self._row[_ACTIVE] = 1

    def write_growth(self, stats: GrowthStats) -> None:
        if self._row is not None:
            self._row[_GROWTHS:_RANKS] = stats

    def write_memory(self, rank: int, pool_bytes: int, resident_bytes: int) -> None:
        """Bytes of the pool of one worker: reserved address space and resident memory."""
        if self._row is not None and 0 <= rank < MAX_RANKS:
            self._row[_RANKS + 2 * rank] = pool_bytes
            self._row[_RANKS + 2 * rank + 1] = resident_bytes


class _Collector:
    """Prometheus collector: reads the file when it is asked."""

    def __init__(self, path: str, model_name: str) -> None:
        self.path = path
        self.model_name = model_name

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ["model_name", "engine"]
        growths = CounterMetricFamily(
            "bmc:kv_growths", "Growths of requests' KV caches.", labels=labels
        )
        gauges = [
            GaugeMetricFamily(name, text, labels=labels)
            for name, text in (
                ("bmc:kv_rows_reserved", "Rows that requests hold or would grow into."),
                ("bmc:kv_rows_spare", "Of those, rows that no token needs yet."),
                ("bmc:kv_pool_bytes", "Address space of the KV pool, all workers."),
                ("bmc:kv_pool_resident_bytes", "Memory of the KV pool in RAM, all workers."),
            )
        ]
        try:
            table = np.fromfile(self.path, dtype=np.int64).reshape(_SHAPE)
        except (OSError, ValueError):
            return
        for engine, row in enumerate(table):
            if not row[_ACTIVE]:
                continue
            values = [self.model_name, str(engine)]
            growths.add_metric(values, float(row[_GROWTHS]))
            numbers = (
                row[_RESERVED],
                row[_SPARE],
                row[_RANKS::2].sum(),
                row[_RANKS + 1 :: 2].sum(),
            )
            for gauge, number in zip(gauges, numbers, strict=True):
                gauge.add_metric(values, float(number))
        yield growths
        yield from gauges


def publish(vllm_config: VllmConfig) -> None:
    """Creates the file (once per process tree) and the collector (once per process)."""
    global _collector
    path = os.environ.get(ENV_STATS_FILE)
    if not path or not os.path.exists(path):
        try:
            path = _create_file()
        except OSError:
            return
        os.environ[ENV_STATS_FILE] = path
    model_config = vllm_config.model_config
    name = "" if model_config is None else model_config.served_model_name or model_config.model
    if isinstance(name, list):
        name = name[0]
    if _collector is None:
        from prometheus_client import REGISTRY

        _collector = _Collector(path, name)
        REGISTRY.register(_collector)  # type: ignore[arg-type]
    else:
        _collector.path, _collector.model_name = path, name


def _create_file() -> str:
    handle, path = tempfile.mkstemp(prefix="bmc-vllm-stats-")
    with os.fdopen(handle, "wb") as file:
        file.write(np.zeros(_SHAPE, dtype=np.int64).tobytes())
    owner = os.getpid()

    def remove() -> None:
        # A forked child runs this too, but the file is not its own.
        if os.getpid() == owner:
            with contextlib.suppress(OSError):
                os.unlink(path)

    atexit.register(remove)
    return path
