"""What writers write is collected: from anonymous files, or from prometheus_client's folder."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from bmc_vllm import metrics
from bmc_vllm.drafts import DraftStats
from bmc_vllm.kv_cache_manager import GrowthStats
from bmc_vllm.metrics import FOLDER, StatsWriter

Figures = dict[tuple[str, str], float]


def config(instance: str, engine: int = 0, model: str = "m") -> SimpleNamespace:
    """What metrics.py reads of a VllmConfig."""
    return SimpleNamespace(
        instance_id=instance,
        model_config=SimpleNamespace(served_model_name=[model], model="path"),
        parallel_config=SimpleNamespace(data_parallel_index=engine),
    )


def figures(collector) -> Figures:
    """(metric, engine) -> value; a metric with the label k has it in its name."""
    registry = CollectorRegistry()
    registry.register(collector)
    assert b"pid=" not in generate_latest(registry)
    found = {}
    for sample in chain.from_iterable(family.samples for family in registry.collect()):
        k = f" k={sample.labels['k']}" if "k" in sample.labels else ""
        found[sample.name + k, sample.labels["engine"]] = sample.value
    return found


@pytest.fixture(params=["memory", "folder"])
def collected(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Figures]:
    """The figures of instance "a" in both modes: one API server, and several."""
    if request.param == "folder":
        monkeypatch.setenv(FOLDER, str(tmp_path))
        return lambda: figures(MultiProcessCollector(None, str(tmp_path)))
    monkeypatch.delenv(FOLDER, raising=False)
    return lambda: of("a")


def of(*instances: str) -> Figures:
    collector = metrics._Collector()
    collector.instances.extend(instances)
    return figures(collector)


def test_what_is_written_is_collected(collected: Callable[[], Figures]) -> None:
    scheduler = StatsWriter(config("a", engine=1))
    scheduler.write_growth(GrowthStats(growths=2, rows_reserved=128, rows_spare=1))
    scheduler.write_growth(GrowthStats(growths=3, rows_reserved=256, rows_spare=40))
    workers = [StatsWriter(config("a", engine=1)) for _ in range(2)]
    for rank, worker in enumerate(workers):
        worker.write_memory(1000, 100 + rank)
    assert collected() == {
        ("bmc:kv_growths_total", "1"): 3,
        ("bmc:kv_rows_reserved", "1"): 256,
        ("bmc:kv_rows_spare", "1"): 40,
        ("bmc:kv_pool_bytes", "1"): 2000,
        ("bmc:kv_pool_resident_bytes", "1"): 201,
    }


def test_counters_of_drafts(collected: Callable[[], Figures]) -> None:
    writer = StatsWriter(config("a"))
    writer.write_drafts(DraftStats(9, 7, 2, 1, (4, 0, 3)))
    assert collected() == {
        ("bmc:spec_decode_rows_offered_total", "0"): 9,
        ("bmc:spec_decode_rows_used_total", "0"): 7,
        ("bmc:spec_decode_growths_total", "0"): 2,
        ("bmc:spec_decode_parked_steps_total", "0"): 1,
        ("bmc:spec_decode_lengths_total k=0", "0"): 4,
        ("bmc:spec_decode_lengths_total k=1", "0"): 0,
        ("bmc:spec_decode_lengths_total k=2", "0"): 3,
    }


def test_engines_have_their_own_rows(collected: Callable[[], Figures]) -> None:
    writers = [StatsWriter(config("a", engine)) for engine in (0, 17)]
    for writer in writers:
        writer.write_memory(10, 1)
    assert collected()["bmc:kv_pool_bytes", "0"] == 10
    assert collected()["bmc:kv_pool_bytes", "17"] == 10


def test_the_ranks_of_an_engine_that_is_gone_do_not_count(
    collected: Callable[[], Figures],
) -> None:
    ranks = [StatsWriter(config("a")) for _ in range(2)]
    for rank in ranks:
        rank.write_memory(10, 1)
    assert collected()["bmc:kv_pool_bytes", "0"] == 20
    del rank, ranks[1]
    assert collected()["bmc:kv_pool_bytes", "0"] == 10
    ranks.clear()
    assert collected() == {}


def test_of_two_engines_in_a_process_the_later_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    first = [StatsWriter(config("a")) for _ in range(2)]
    for rank in first:
        rank.write_memory(10, 1)
    second = StatsWriter(config("b"))
    second.write_memory(5, 1)
    assert of("a", "b")["bmc:kv_pool_bytes", "0"] == 5
    assert of("b", "not-started")["bmc:kv_pool_bytes", "0"] == 5


CHILD = """
import os, signal, subprocess, sys
from types import SimpleNamespace
from bmc_vllm.metrics import StatsWriter
def config(instance):
    return SimpleNamespace(instance_id=instance, parallel_config=SimpleNamespace(
        data_parallel_index=0), model_config=SimpleNamespace(served_model_name="m", model="m"))
writers = [StatsWriter(config(name)) for name in sys.argv[1:]]
for writer in writers:
    writer.write_memory(7, 3)
if os.fork() == 0:  # holds the same files
    sys.stdin.read()
    os._exit(0)
print("ready", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_below_are_read_each_once_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child with a server of its own ("b") counts there only; SIGKILL leaves no file."""
    monkeypatch.delenv(FOLDER, raising=False)
    own = StatsWriter(config("a"))
    own.write_memory(10, 1)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "a", "b"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    assert of("a")["bmc:kv_pool_bytes", "0"] == 17
    assert of("a")["bmc:kv_pool_resident_bytes", "0"] == 4
    assert of("b")["bmc:kv_pool_bytes", "0"] == 7
    child.stdin.close()
    child.wait(30)
    child.stdout.close()
    assert of("a")["bmc:kv_pool_bytes", "0"] == 10
    assert not os.listdir(tmp_path)


def test_a_writer_that_ends_takes_its_files_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    kept = tmp_path / "gauge_livesum_1.db"
    kept.write_bytes(b"another process's")
    writer = StatsWriter(config("a"))
    writer.write_memory(1, 1)
    writer.write_growth(GrowthStats(1, 2, 3))
    assert len(os.listdir(tmp_path)) == 3
    del writer
    assert os.listdir(tmp_path) == [kept.name]


def test_a_users_file_is_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is a file, or is gone: no figures, no error."""
    file = tmp_path / "thesis.txt"
    file.write_text("mine")
    for path in (file, tmp_path / "gone"):
        monkeypatch.setenv(FOLDER, str(path))
        StatsWriter(config("a")).write_memory(1, 1)
    assert file.read_text() == "mine"
    assert os.listdir(tmp_path) == [file.name]


def test_a_full_disk_ends_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a mapped file that gets no space on the disk would: all of them have theirs."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    writer = StatsWriter(config("a"))
    writer.write_memory(1, 1)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_blocks * 512 >= file.stat().st_size > 0
    del writer


NO_SPACE = """
import resource
from bmc_vllm.metrics import StatsWriter
from tests.vllm.test_metrics import config

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
writer = StatsWriter(config("a"))
writer.write_memory(1, 1)
writer.write_memory(1, 1)
"""


def test_a_disk_without_space_gets_no_file(tmp_path: Path) -> None:
    """Nor an empty one, which would end vLLM's own /metrics."""
    subprocess.run(
        [sys.executable, "-c", NO_SPACE],
        env={**os.environ, FOLDER: str(tmp_path)},
        check=True,
        timeout=60,
    )
    assert not os.listdir(tmp_path)


def test_nothing_lies_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writer = StatsWriter(config("a"))
    writer.write_memory(1, 1)
    assert not os.listdir(tmp_path)
