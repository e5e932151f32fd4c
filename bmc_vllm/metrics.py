"""Counters of BMC in vLLM's Prometheus ``/metrics``.

The numbers arise in the scheduler's and the workers' processes, ``/metrics`` is answered by the
API server's. vLLM's own channel between them carries a fixed set of fields, and its plugin group
for stat loggers would change stock behavior wherever this package is installed. So each writer
has files of its own, in the format of prometheus_client's multi-process mode:

- With several API servers vLLM turns that mode on (``PROMETHEUS_MULTIPROC_DIR``), and its
  ``/metrics`` adds up the files of that folder. Ours lie there, and go with the folder.
- With one, that mode must stay off: whether it is on is read from the environment, and decides how
  vLLM's own metrics are kept. The same files then are anonymous memory (memfd), named after the
  engine's `VllmConfig.instance_id`. A collector in the API server finds them among the open files
  of the processes below its own.

Promises: without BMC selected no file and no collector exist. A writer that cannot have a file (a
full disk, another system than Linux) stays silent, and so does one on another host. A writer's
numbers go with it, however it ends; in a folder, unless it is killed. Of two engines with the same
labels in one process the later shows, as with vLLM's own metrics.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from bmc_vllm.drafts import DraftStats
    from bmc_vllm.kv_cache_manager import GrowthStats

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's variable, set by vLLM."""
MEMORY_FILE = "bmc-vllm"
"""How the names of our anonymous files begin."""

FILE_BYTES = 1 << 16
"""Far more than the metrics of a writer take; as many as prometheus_client's own files have."""

COUNTER, GAUGE = "counter", "gauge_livesum"
"""Types of metrics, as prometheus_client names its files: gauges of several processes add up."""
_GROWTHS = ("bmc:kv_growths", "Growths of requests' KV caches.")
_RESERVED = ("bmc:kv_rows_reserved", "Rows that requests hold or would grow into.")
_SPARE = ("bmc:kv_rows_spare", "Of those, rows that no token needs yet.")
_POOL = ("bmc:kv_pool_bytes", "Bytes of the KV pool, all workers.")
_RESIDENT = ("bmc:kv_pool_resident_bytes", "Memory of the KV pool in RAM, all workers.")
_OFFERED = ("bmc:spec_decode_rows_offered", "Spare rows that draft tokens could have had.")
_USED = ("bmc:spec_decode_rows_used", "Spare rows that draft tokens were written to.")
_DRAFT_GROWTHS = ("bmc:spec_decode_growths", "Blocks taken for draft tokens ahead of need.")
_PARKED = ("bmc:spec_decode_parked_steps", "Steps after which the drafter did not run.")
_LENGTHS = ("bmc:spec_decode_lengths", "Requests' steps by draft tokens verified (label k).")

_serial = itertools.count()
_collector: _Collector | None = None


class StatsWriter:
    """Writes the numbers of one scheduler or worker; does nothing where it cannot have a file."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        model = vllm_config.model_config
        name = "" if model is None else model.served_model_name or model.model
        self._labels = {
            "model_name": name[0] if isinstance(name, list) else name,
            "engine": str(vllm_config.parallel_config.data_parallel_index),
        }
        self._instance = vllm_config.instance_id
        self._files: dict[str, _File] = {}

    def write_growth(self, stats: GrowthStats) -> None:
        self._write(COUNTER, _GROWTHS, stats.growths)
        self._write(GAUGE, _RESERVED, stats.rows_reserved)
        self._write(GAUGE, _SPARE, stats.rows_spare)

    def write_drafts(self, stats: DraftStats) -> None:
        self._write(COUNTER, _OFFERED, stats.rows_offered)
        self._write(COUNTER, _USED, stats.rows_used)
        self._write(COUNTER, _DRAFT_GROWTHS, stats.growths)
        self._write(COUNTER, _PARKED, stats.parked_steps)
        for length, steps in enumerate(stats.lengths):
            self._write(COUNTER, _LENGTHS, steps, k=str(length))

    def write_memory(self, pool_bytes: int, resident_bytes: int) -> None:
        """Bytes of the pool of one worker, and how many of them are in memory."""
        self._write(GAUGE, _POOL, pool_bytes)
        self._write(GAUGE, _RESIDENT, resident_bytes)

    def _write(self, kind: str, metric: tuple[str, str], value: int, **labels: str) -> None:
        name, text = metric
        if kind not in self._files:
            self._files[kind] = _File(kind, self._instance)
        sample = name + "_total" if kind == COUNTER else name
        labels = {**self._labels, **labels}
        key = mmap_key(name, sample, list(labels), list(labels.values()), text)
        self._files[kind].write(key, float(value))


class _File:
    """One writer's metrics of one type: a file of the folder, or anonymous memory."""

    def __init__(self, kind: str, instance: str) -> None:
        # prometheus_client's own files have the process id where ours say a little more.
        name = f"{kind}_bmc-{os.getpid()}-{next(_serial)}.db"
        self._lock = threading.Lock()
        self._values: MmapedDict | None = None
        folder = os.environ.get(FOLDER)
        path = None if folder is None else os.path.join(folder, name)
        with contextlib.suppress(OSError, AttributeError):
            if path is not None:
                _reserve(path)
                self._values = MmapedDict(path)
            else:
                handle = os.memfd_create(f"{MEMORY_FILE}:{instance}:{name}")
                try:
                    self._values = MmapedDict(f"/proc/self/fd/{handle}")
                finally:
                    os.close(handle)
        if self._values is not None:
            weakref.finalize(self, _close, self._values, self._lock, path, os.getpid())

    def write(self, key: str, value: float) -> None:
        with self._lock:
            # A file that the interpreter's exit has closed is None inside.
            if self._values is not None and self._values._f is not None:
                self._values.write_value(key, value, 0.0)


def _reserve(path: str) -> None:
    """Makes a file with space on the disk, or none at all.

    The system ends a process that writes to a mapped page for which the disk has no space, and
    prometheus_client cannot read a file that is empty.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.posix_fallocate(handle, 0, FILE_BYTES)
        finally:
            os.close(handle)
    except (OSError, AttributeError):
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _close(values: MmapedDict, lock: threading.Lock, path: str | None, owner: int) -> None:
    with lock:
        values.close()
    # A forked child runs this too, but the file is not its own.
    if path is not None and os.getpid() == owner:
        with contextlib.suppress(OSError):
            os.unlink(path)


def publish(vllm_config: VllmConfig) -> None:
    """Makes the collector of this process show the engine with this configuration."""
    global _collector
    if os.environ.get(FOLDER) is not None:
        return  # vLLM's own collector reads the folder.
    if _collector is None:
        from prometheus_client import REGISTRY

        _collector = _Collector()
        REGISTRY.register(_collector)  # type: ignore[arg-type]
    _collector.instances.append(vllm_config.instance_id)


class _Collector:
    """Prometheus collector over the anonymous files.

    Attributes:
        instances: of the engines that this process has configured, the latest last.
    """

    def __init__(self) -> None:
        self.instances: list[str] = []

    def describe(self) -> list[Metric]:
        """Nothing is read when the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        found: dict[str, dict[tuple[str, str], float]] = {}
        for instance, kind, path in _memory_files():
            sums = found.setdefault(instance, defaultdict(float))
            for key, value in _read(path):
                sums[kind, key] += value
        shown: dict[tuple[str, str], float] = {}
        for instance in self.instances:
            shown.update(found.get(instance, {}))
        families: dict[str, Metric] = {}
        for (kind, key), value in shown.items():
            name, sample, labels, text = json.loads(key)
            if name not in families:
                families[name] = Metric(name, text, kind.partition("_")[0])
            families[name].add_sample(sample, labels, value)
        yield from families.values()


def _memory_files() -> Iterator[tuple[str, str, str]]:
    """Instance, type of metric, and a path to open, of each file of this process and of those
    below it. A file that a forked child has inherited is named once."""
    import psutil

    here = psutil.Process()
    seen: set[str] = set()
    for process in (here, *here.children(recursive=True)):
        folder = f"/proc/{process.pid}/fd"
        with contextlib.suppress(OSError):  # It has ended, or is another user's.
            for handle in os.listdir(folder):
                path = f"{folder}/{handle}"
                with contextlib.suppress(OSError):
                    target = os.readlink(path)
                    if target.startswith(f"/memfd:{MEMORY_FILE}:") and target not in seen:
                        seen.add(target)
                        _, _, instance, name = target.split(":")
                        yield instance, name.partition("_bmc-")[0], path


def _read(path: str) -> list[tuple[str, float]]:
    try:
        values = MmapedDict.read_all_values_from_file(path)
        return [(key, value) for key, value, _, _ in values]
    except (OSError, RuntimeError, ValueError, struct.error):  # It ends, or begins, right now.
        return []
