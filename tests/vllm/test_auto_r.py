"""`"r": "auto"` in an engine: what was measured is what the managers grow by."""

import pytest

from bmc_core.costs.pieces import PIECES
from bmc_core.policy import DEFAULT_R
from bmc_vllm import auto_r
from tests.support.engines import engine, generate, scheduler
from tests.support.models import ModelStore


def test_auto_is_measured(
    model_dir: ModelStore, monkeypatch: pytest.MonkeyPatch, vllm_log: list[str]
) -> None:
    asked = []

    def short(*args, **settings):
        asked.append(args)
        return piece_seconds(*args, **{**settings, "seconds": 0.0, "most": 1 << 20})

    piece_seconds = auto_r.piece_seconds
    monkeypatch.setattr(auto_r, "piece_seconds", short)
    auto = {"bmc": {"r": "auto"}}
    with engine(model_dir("llama-gqa"), "BMC", additional_config=auto) as llm:
        rows = scheduler(llm).growth.queue.chunk_blocks * 32
        assert rows in PIECES
        assert len(generate(llm, [[1, 2, 3]], max_tokens=4)[0]) == 4
    assert [args[:2] for args in asked] == [(2, 32)]
    (start,) = [line for line in vllm_log if line.startswith("BMC: attention backend")]
    assert '1 of 1 KV cache groups in chunks (r="auto": measured next); ' in start
    (measured,) = [line for line in vllm_log if line.startswith('BMC: r="auto" is ')]
    assert f"is {rows} rows: " in measured


def test_where_nothing_can_be_measured(
    model_dir: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args, **settings):
        raise MemoryError("no room")

    monkeypatch.setattr(auto_r, "piece_seconds", fails)
    with engine(model_dir("llama-gqa"), "BMC", additional_config={"bmc": {"r": "auto"}}) as llm:
        assert scheduler(llm).growth.queue.chunk_blocks == 4


def test_a_busy_machine_is_named(
    model_dir: ModelStore, monkeypatch: pytest.MonkeyPatch, vllm_log: list[str]
) -> None:
    """No piece within the tolerance: the line must not read like a measured choice."""
    seconds = {0: 1.0, **dict.fromkeys(PIECES, 1.36)}
    monkeypatch.setattr(auto_r, "piece_seconds", lambda *args, **settings: seconds)
    with engine(model_dir("llama-gqa"), "BMC", additional_config={"bmc": {"r": "auto"}}) as llm:
        assert scheduler(llm).growth.queue.chunk_blocks * 32 == DEFAULT_R
    (line,) = [line for line in vllm_log if line.startswith('BMC: r="auto" is ')]
    assert "is 128 rows: no piece" in line
    assert "(1024 rows took 36% longer)" in line
