"""The head of every document, and strict writing."""

import json
from pathlib import Path

import pytest

from benchmarks.lib import record
from bmc_core import native
from bmc_core.machine.load import BUSY


def test_the_machine_is_described() -> None:
    found = record.describe()
    assert found.cpu
    assert found.cores >= 1
    assert found.l3_bytes > 0
    assert found.available_bytes > 0


def test_a_record_names_machine_versions_and_instruction_sets() -> None:
    found = record.Recorder().record()
    assert found.isas.ours == native.isa()
    assert found.isas.theirs in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")
    assert set(found.versions) == {"python", "torch", "vllm", "transformers", "deepspeed", "bmc"}
    assert str(found.isas) in found.head()
    assert record.Recorder().record("avx2").isas.theirs == "avx2"


def test_a_commit_is_told_where_there_is_git(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "TREE", tmp_path)
    assert record.commit() is None


def test_a_busy_machine_is_said() -> None:
    found = record.Recorder().record()
    for others, told in ((None, False), (BUSY, False), (BUSY + 0.01, True)):
        machine = found.machine._replace(others=others)
        assert (found._replace(machine=machine).busy_note() is not None) == told


def test_a_document_has_one_head() -> None:
    found = record.document("x", record.Recorder().record(), {"r": 1}, failures=["no"], rows=[1])
    assert list(found) == [
        *("schema", "benchmark", "created", "machine", "instruction_sets", "versions", "commit"),
        *("settings", "failures", "missing", "rows", "goals"),
    ]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    record.write({"error": float("inf"), "list": [float("nan"), 1.5]}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"error": None, "list": [None, 1.5]}
