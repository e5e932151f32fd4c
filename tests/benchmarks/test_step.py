"""The step benchmark, with engines that are played by a few lines."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernel.report import now
from benchmarks.step import run as step
from benchmarks.step.cases import Shape, StepCase

SHAPE = Shape("tiny", 1, 64, 2, 1, 32, intermediate=64, vocabulary=64)
CASE = StepCase("tiny 2x10", SHAPE, 2, 10, goal=1.5)


class PlayedEngine:
    """Answers like `step_engine.Engine`; BMC's steps take half the time."""

    asked: list[tuple[str, str]]
    logits: dict[str, torch.Tensor]

    def __init__(self, title: str, command: list[str], environment: Any) -> None:
        self.name = title.split(", ")[1]
        self.bind = environment["VLLM_CPU_OMP_THREADS_BIND"]

    def ask(self, timeout: float, **request: Any) -> dict[str, Any]:
        self.asked.append((self.name, request["do"]))
        match request["do"]:
            case "start":
                assert request["backend"] == self.name
                assert (Path(request["model"]) / "model.safetensors").exists()
                return {"threads": 2, "backends": [self.name]}
            case "fill":
                return {"seconds": 1.0}
            case "check":
                torch.save(self.logits[self.name], request["path"])
                return {"finite": bool(self.logits[self.name].isfinite().all())}
            case "steps":
                return {"seconds": [0.01 if self.name == "BMC" else 0.02] * request["count"]}
        return {"tokens": [[1, 2], [3, 4]]}

    def close(self) -> None:
        self.asked.append((self.name, "close"))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedEngine]:
    logits = torch.randn(2, 64)
    monkeypatch.setattr(PlayedEngine, "asked", [], raising=False)
    both = {"BMC": logits, "CPU_ATTN": logits}
    monkeypatch.setattr(PlayedEngine, "logits", both, raising=False)
    monkeypatch.setattr(step, "WorkerProcess", PlayedEngine)
    return PlayedEngine


OPTIONS = step.Options([CASE], "0-1", rounds=2, steps=3)


def test_engines_are_stepped_in_turns(played: type[PlayedEngine]) -> None:
    report = step.run(OPTIONS)
    assert report.failures == []
    turns = [name for name, action in played.asked if action == "steps"]
    assert turns == ["BMC", "CPU_ATTN", "BMC", "CPU_ATTN", "CPU_ATTN", "BMC"]
    assert played.asked[-2:] == [("BMC", "close"), ("CPU_ATTN", "close")]
    ours, theirs = report.rows
    assert ours.timing.calls == theirs.timing.calls == 6
    assert ours.ratio == pytest.approx(2.0)
    assert theirs.ratio == pytest.approx(0.5)


def test_document_and_table(played: type[PlayedEngine], capsys: pytest.CaptureFixture) -> None:
    from rich.console import Console

    report = step.run(OPTIONS)
    document = step.step_document(report, now())
    ours, theirs = document["rows"]
    assert (ours["goal"], ours["met"], theirs["goal"], theirs["met"]) == (1.5, True, None, None)
    assert ours["tokens_per_second"] == pytest.approx(200)
    assert document["settings"]["bind"] == "0-1"
    step.show_step(report, Console(width=150))
    assert "tiny 2x10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits * 1.2, "BMC's logits differ from CPU_ATTN's"),
        (lambda logits: logits * float("nan"), "BMC gives logits that are not finite"),
    ],
)
def test_wrong_logits_make_the_run_fail(played: type[PlayedEngine], change, message) -> None:
    played.logits["BMC"] = change(played.logits["CPU_ATTN"])
    assert any(message in failure for failure in step.run(OPTIONS).failures)


def test_engines_are_closed_after_an_error(played: type[PlayedEngine]) -> None:
    del played.logits["CPU_ATTN"]
    with pytest.raises(KeyError):
        step.run(OPTIONS)
    assert ("BMC", "close") in played.asked
    assert ("CPU_ATTN", "close") in played.asked
