"""What the system says of its processor, and what is said where it says nothing."""

from pathlib import Path

import pytest

from bmc_core.machine import cpu

INFO = """processor\t: 0
model name\t: A Processor @ 3.00GHz
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16
"""


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four logical CPUs on two physical cores, 0 with 2 and 1 with 3, under three of the mask."""
    monkeypatch.setattr(cpu, "CPUS", tmp_path)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {0, 1, 2})
    for number in range(4):
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 2},{number % 2 + 2}\n")
    return tmp_path


def test_the_name_and_the_instruction_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(INFO)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.model_name() == "A Processor @ 3.00GHz"
    assert cpu.instruction_sets() == ("avx2", "avx512", "avx512_bf16", "amx", "amx_bf16")


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(cpu, "CPUS", tmp_path / "none")
    assert cpu.model_name()
    assert cpu.instruction_sets() == ()
    assert cpu.l3_bytes() is None
    assert cpu.physical_cores([3, 1]) == [1, 3], "each logical CPU counts as a core"


def test_one_logical_cpu_of_each_core(cpus: Path) -> None:
    assert cpu.physical_cores({0, 1, 2, 3}) == [0, 1]
    assert cpu.physical_cores([3, 2]) == [2, 3]
    assert cpu.physical_cores([2]) == [2]


def test_l3_is_summed_over_distinct_caches(cpus: Path) -> None:
    for number, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        folder = cpus / f"cpu{number}" / "cache" / "index3"
        folder.mkdir(parents=True)
        for name, text in (("level", "3"), ("size", "32768K"), ("shared_cpu_list", shared)):
            (folder / name).write_text(text + "\n")
    assert cpu.l3_bytes() == 64 << 20


@pytest.mark.parametrize(
    ("cpus_of", "text"), [({0, 1, 2, 5}, "0-2,5"), ([3], "3"), ([], ""), ([7, 6, 6], "6-7")]
)
def test_cpu_lists(cpus_of, text: str) -> None:
    assert cpu.to_list_text(cpus_of) == text
