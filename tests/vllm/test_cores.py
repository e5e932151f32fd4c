"""When the log speaks of idle cores, and which binding it names."""

from pathlib import Path

import pytest

from bmc_core.machine import cpu
from bmc_vllm import cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight logical CPUs, two to a core; this worker's own mask is narrower than its parent's."""
    for number in range(8):
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    masks = {0: {0, 1}, 77: set(range(8))}
    monkeypatch.setattr(cpu, "CPUS", tmp_path)
    monkeypatch.setattr(cores.os, "sched_getaffinity", masks.__getitem__)
    monkeypatch.delenv(cores.SETTING, raising=False)


@pytest.mark.usefixtures("machine")
def test_idle_physical_cores_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = cores.idle_core_warning(threads=3, workers=1, parent_pid=77)
    assert text == (
        "1 of 4 physical cores have no compute thread (VLLM_CPU_OMP_THREADS_BIND=auto); "
        "set VLLM_CPU_OMP_THREADS_BIND=0-3 to use all"
    )
    monkeypatch.setenv(cores.SETTING, "0")
    assert "(VLLM_CPU_OMP_THREADS_BIND=0)" in (cores.idle_core_warning(1, 1, 77) or "")


@pytest.mark.usefixtures("machine")
def test_each_worker_gets_its_share() -> None:
    text = cores.idle_core_warning(threads=1, workers=2, parent_pid=77)
    assert text is not None
    assert "set VLLM_CPU_OMP_THREADS_BIND=0-1|2-3" in text


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("threads", "workers"), [(4, 1), (2, 2), (8, 1)])
def test_silence_where_every_core_computes(threads: int, workers: int) -> None:
    assert cores.idle_core_warning(threads, workers, 77) is None


@pytest.mark.usefixtures("machine")
def test_a_parent_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(pid: int) -> set[int]:
        if pid:
            raise ProcessLookupError
        return {0, 1}

    monkeypatch.setattr(cores.os, "sched_getaffinity", mask)
    assert cores.idle_core_warning(2, 1, parent_pid=77) is None
