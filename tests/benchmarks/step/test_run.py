"""The step benchmark, with engines that are played by a few lines."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks.engines import base
from benchmarks.engines.base import Batch, Engine, Step
from benchmarks.lib.llama import TINY, RandomLlama
from benchmarks.step import report as reports
from benchmarks.step import run as step
from benchmarks.step.cases import StepCase

CASE = StepCase("mha 8x2000", TINY, 2, 10)


class PlayedEngine(Engine):
    """BMC's steps take half the time."""

    asked: list[tuple[str, str]]
    played_logits: dict[str, torch.Tensor]
    reference = "cpu_attn"
    threads = 2

    def __init__(self, name: str, settings) -> None:
        self.name, self.peer = name, name == "cpu_attn"
        self.title = self.process = {"bmc_vllm": "BMC", "cpu_attn": "CPU_ATTN"}[name]
        assert settings.bind == "0-1"

    def start(self, model: RandomLlama, largest: Batch) -> None:
        self.asked.append((self.title, "start"))
        assert (model.folder() / "model.safetensors").exists()
        assert largest.sequences == CASE.batch
        assert largest.rows == CASE.rows

    def fill(self, batch: Batch) -> None:
        self.asked.append((self.title, "fill"))

    def step(self, count: int) -> list[Step]:
        self.asked.append((self.title, "steps"))
        return [Step(0.01 if self.title == "BMC" else 0.02)] * count

    def logits(self) -> torch.Tensor:
        return self.played_logits[self.title]

    def tokens(self) -> list[list[int]]:
        return [[1, 2], [3, 4]]

    def wear(self) -> None:
        self.asked.append((self.title, "wear"))

    def empty(self) -> None:
        self.asked.append((self.title, "empty"))

    def generate(self, prompts: torch.Tensor, new: int) -> torch.Tensor:
        raise NotImplementedError

    def close(self) -> None:
        self.asked.append((self.title, "close"))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedEngine]:
    logits = torch.randn(2, 64)
    monkeypatch.setattr(PlayedEngine, "asked", [], raising=False)
    both = {"BMC": logits, "CPU_ATTN": logits}
    monkeypatch.setattr(PlayedEngine, "played_logits", both, raising=False)
    monkeypatch.setattr(step, "make", PlayedEngine)
    return PlayedEngine


OPTIONS = step.Options([CASE], "0-1", rounds=2, steps=3, pools=[step.VIRGIN])


def test_engines_are_stepped_in_turns(played: type[PlayedEngine]) -> None:
    report = step.run(OPTIONS)
    assert report.failures == []
    turns = [name for name, action in played.asked if action == "steps"]
    # Warm steps, then two rounds of turns: the steps that wake, and those that are timed.
    assert turns == ["BMC", "CPU_ATTN", *["BMC"] * 2, *["CPU_ATTN"] * 4, *["BMC"] * 2]
    assert set(played.asked[-2:]) == {("BMC", "close"), ("CPU_ATTN", "close")}
    ours, theirs = report.rows
    assert ours.timing.calls == theirs.timing.calls == 6
    assert ours.ratio == pytest.approx(2.0)
    assert theirs.ratio == pytest.approx(0.5)


def test_goals_are_judged_in_the_worn_pool(
    played: type[PlayedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is virgin once, so that comes first; what users have stands first."""

    def slower(self, count: int) -> list[Step]:
        worn = ("BMC", "wear") in self.asked
        return [Step(0.01 * (1 + worn) if self.title == "BMC" else 0.02)] * count

    monkeypatch.setattr(PlayedEngine, "step", slower)
    report = step.run(replace(OPTIONS, pools=step.POOLS))
    asked = [action for name, action in played.asked if name == "BMC"]
    assert asked == ["start", "fill", "empty", "wear", "fill", "empty", "close"]
    pools = [(row.pool, row.system) for row in report.rows]
    assert pools == [(p, s) for p in ("worn", "virgin") for s in ("bmc_vllm", "cpu_attn")]
    (verdict,) = step.judge(report.rows, [step.GOALS[0]])
    assert verdict.value == pytest.approx(1.0)
    assert report.rows[2].ratio == pytest.approx(2.0)


def test_document_and_table(played: type[PlayedEngine]) -> None:
    report = step.run(OPTIONS)
    goal = next(goal for goal in step.GOALS if goal.case == CASE.name)
    verdicts = step.judge(report.rows, [goal])
    document = reports.document(report._replace(verdicts=verdicts))
    (judged,) = document["goals"]
    assert (judged["bound"], judged["value"], judged["met"]) == (1.45, pytest.approx(2.0), True)
    ours, theirs = document["rows"]
    assert (ours["system"], theirs["system"]) == ("bmc_vllm", "cpu_attn")
    assert ours["tokens_per_second"] == pytest.approx(200)
    assert ours["floor_binds"] in ("reads", "products")
    assert document["settings"]["bind"] == "0-1"
    console = Console(width=150)
    with console.capture() as shown:
        reports.show(report, console)
    assert "mha 8x2000" in shown.get()
    assert "Goals" not in shown.get()
    with console.capture() as shown:
        reports.show(report._replace(verdicts=verdicts), console, with_goals=True)
    assert "Goals" in shown.get()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits * 1.2, "BMC's logits differ from CPU_ATTN's"),
        (lambda logits: logits * float("nan"), "BMC gives logits that are not finite"),
    ],
)
def test_wrong_logits_make_the_run_fail(played: type[PlayedEngine], change, message) -> None:
    played.played_logits["BMC"] = change(played.played_logits["CPU_ATTN"])
    assert any(message in failure for failure in step.run(OPTIONS).failures)


def test_logits_after_the_turns_are_compared(
    played: type[PlayedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the sequences that have the same tokens until there."""

    def logits(self) -> torch.Tensor:
        found = self.played_logits[self.title].clone()
        if self.title == "BMC" and self.asked.count(("BMC", "steps")) > 1:
            found[1] *= 2
        return found

    monkeypatch.setattr(PlayedEngine, "logits", logits)
    report = step.run(OPTIONS)
    assert "after the turns" in report.failures[0]
    assert report.rows[0].logits_error == 0
    tokens = {"BMC": [[1, 2], [3, 5]], "CPU_ATTN": [[1, 2], [3, 4]]}
    monkeypatch.setattr(PlayedEngine, "tokens", lambda self: tokens[self.title])
    played.asked.clear()
    assert step.run(OPTIONS).failures == [], "the second sequence went another way"
    tokens["BMC"][0] = [9, 9]
    played.asked.clear()
    report = step.run(OPTIONS)
    assert report.failures == []
    assert "no sequence has CPU_ATTN's tokens" in report.missing[0]


def test_engines_are_closed_after_an_error(played: type[PlayedEngine]) -> None:
    del played.played_logits["CPU_ATTN"]
    with pytest.raises(KeyError):
        step.run(OPTIONS)
    assert ("BMC", "close") in played.asked
    assert ("CPU_ATTN", "close") in played.asked


def test_engines_with_different_threads_make_the_run_fail(
    played: type[PlayedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = property(lambda self: 1 if self.peer else 2)
    monkeypatch.setattr(PlayedEngine, "threads", threads)
    assert any("the engines have" in failure for failure in step.run(OPTIONS).failures)


def test_steps_agree_until_the_first_difference() -> None:
    assert step.agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(4 / 6)
    assert step.agreement([[]], [[]]) == 1.0


def test_a_case_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "available_bytes", lambda: 1 << 30)
    options = step.Options([CASE], "0")
    with pytest.raises(MemoryError, match="mha 8x2000: .* GB are needed, .* leave the case out"):
        step.run(options)
