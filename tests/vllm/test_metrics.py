"""The statistics file and its Prometheus collector."""

import os
from pathlib import Path

import pytest

from bmc_vllm import metrics
from bmc_vllm.kv_cache_manager import GrowthStats
from bmc_vllm.metrics import ENV_STATS_FILE, MAX_ENGINES, MAX_RANKS, StatsWriter


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> Path:
    path = Path(metrics._create_file())
    monkeypatch.setenv(ENV_STATS_FILE, str(path))
    return path


def collected(path: Path) -> dict[tuple[str, str], float]:
    """(metric, engine) -> value."""
    return {
        (sample.name, sample.labels["engine"]): sample.value
        for family in metrics._Collector(str(path), "model").collect()
        for sample in family.samples
    }


def test_what_is_written_is_collected(file: Path) -> None:
    writer = StatsWriter(1)
    writer.reset_scheduler()
    writer.write_growth(GrowthStats(growths=3, rows_reserved=256, rows_spare=40))
    for rank in range(2):
        StatsWriter(1).write_memory(rank, 1000, 100 + rank)
    found = collected(file)
    assert found == {
        ("bmc:kv_growths_total", "1"): 3,
        ("bmc:kv_rows_reserved", "1"): 256,
        ("bmc:kv_rows_spare", "1"): 40,
        ("bmc:kv_pool_bytes", "1"): 2000,
        ("bmc:kv_pool_resident_bytes", "1"): 201,
    }


def test_engines_that_never_started_are_not_shown(file: Path) -> None:
    assert collected(file) == {}
    StatsWriter(0).reset_scheduler()
    assert {engine for _, engine in collected(file)} == {"0"}


@pytest.mark.parametrize("engine", [-1, MAX_ENGINES])
def test_an_engine_without_a_row_is_silent(file: Path, engine: int) -> None:
    before = file.read_bytes()
    writer = StatsWriter(engine)
    writer.reset_scheduler()
    writer.write_growth(GrowthStats(1, 2, 3))
    writer.write_memory(0, 1, 1)
    assert file.read_bytes() == before


def test_a_rank_without_a_place_is_silent(file: Path) -> None:
    before = file.read_bytes()
    StatsWriter(0).write_memory(MAX_RANKS, 1, 1)
    assert file.read_bytes() == before


@pytest.mark.parametrize("path", [None, "gone"])
def test_a_missing_file_is_silent(
    path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path is None:
        monkeypatch.delenv(ENV_STATS_FILE, raising=False)
    else:
        monkeypatch.setenv(ENV_STATS_FILE, str(tmp_path / path))
    writer = StatsWriter(0)
    writer.reset_scheduler()
    writer.write_growth(GrowthStats(1, 2, 3))
    assert collected(tmp_path / "gone") == {}
    assert not os.listdir(tmp_path)
