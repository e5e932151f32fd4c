"""The speculation benchmark: with systems that are played by a few lines, and transformers' own."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from benchmarks.engines.speculating import base
from benchmarks.engines.speculating.base import (
    AUTO,
    DEFAULT,
    DRAFT,
    NGRAM,
    NONE,
    Length,
    Setup,
    Speculator,
    Turn,
)
from benchmarks.lib.chain import continuation
from benchmarks.lib.llama import TINY
from benchmarks.lib.timing import Timing, summary
from benchmarks.speculation import controller, plot
from benchmarks.speculation import report as reports
from benchmarks.speculation import run as speculation
from benchmarks.speculation.cases import HARD, PLAIN, Case, Pair, both
from benchmarks.speculation.run import GOALS, Options, judge, run

SHAPE = replace(TINY, dtype="float32")
NGRAM_CASE = Case("mha ngram 4 x 2000", Pair(SHAPE, NGRAM, 0.7), PLAIN, 2, 60, 12, both(2, 4))


class Played(Speculator):
    """BMC's steps take half the time; k draft tokens are all right and cost a tenth of a step."""

    asked: ClassVar[list[tuple[str, str, str]]] = []
    wrong_output = ""
    threads = 2
    openmp = "libgomp.so.1"

    def __init__(self, name: str, mode: str, *, bind: str, openmp: str) -> None:
        assert (bind, openmp) == ("0-1", "libgomp")
        self.name, self.mode, self.peer = name, mode, name == "cpu_attn"
        self.title = self.process = {"bmc_vllm": "BMC", "cpu_attn": "CPU_ATTN"}[name]

    def start(self, setup: Setup) -> None:
        assert (setup.batch, setup.rows, setup.new) == (2, 60, 12)
        assert setup.max_draft_tokens == 16
        self.asked.append((self.name, self.mode, "start"))

    def turn(self, prompts: Sequence[Sequence[int]], new: int, length: Length) -> Turn:
        self.asked.append((self.name, self.mode, "turn"))
        k = {NONE: 0, AUTO: 3}.get(str(length), length)
        assert isinstance(k, int)
        steps = new // (k + 1)
        forward = (1.0 if self.peer else 0.5) * (1 + k / 10)
        said = [continuation(SHAPE.vocabulary, list(prompt), new) for prompt in prompts]
        if self.wrong_output == self.mode:
            said[1][6] += 1
        drafts = steps * len(prompts)
        return Turn(
            seconds=steps * forward * 1.1, tokens=new * len(prompts), steps=steps, outputs=said,
            drafted_for=drafts if k else 0, proposed=drafts * k, examined=drafts * k,
            accepted=drafts * k, forward_seconds=steps * forward,
            drafting_seconds=steps * k * 0.01, draft_steps=steps * k,
        )  # fmt: skip

    def start_bytes(self, setup: Setup) -> int:
        return 1 << 20

    def close(self) -> None:
        self.asked.append((self.name, self.mode, "close"))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    monkeypatch.setattr(Played, "asked", [])
    monkeypatch.setattr(speculation, "make", Played)
    monkeypatch.setattr(base, "SETTLE_SECONDS", 0.0)
    return Played


OPTIONS = Options([NGRAM_CASE], "0-1", rounds=2, controller=False)


def test_systems_take_turns_and_are_closed(played: type[Played]) -> None:
    report = run(OPTIONS)
    assert report.failures == report.missing == report.marked == []
    lengths = [(row.system, row.length) for row in report.rows]
    assert lengths == [
        *(("cpu_attn", length) for length in (NONE, 2, 4)),
        *(("bmc_vllm", length) for length in (NONE, 2, 4, AUTO)),
    ]
    started = [asked for asked in played.asked if asked[2] == "start"]
    assert len(started) == 5, "one engine serves every fixed length"
    assert sum(asked[2] == "turn" for asked in played.asked) == len(lengths) * (1 + 2)
    assert sum(asked[2] == "close" for asked in played.asked) == 5


def test_figures_follow_from_turns(played: type[Played]) -> None:
    rows = {(row.system, row.length): row for row in run(OPTIONS).rows}
    auto = rows["bmc_vllm", AUTO]
    assert auto.acceptance == auto.matched == 1.0
    assert (auto.mean_length, auto.tokens_per_step) == (3.0, 4.0)
    assert auto.bound == pytest.approx(4 / 1.3)
    assert auto.over_none == pytest.approx(4 / 1.3)
    assert auto.draft_cost == pytest.approx(0.01 / 0.55)
    assert auto.tokens_per_second == pytest.approx(2 * 4 / (0.65 * 1.1))
    none = rows["bmc_vllm", NONE]
    assert math.isnan(none.acceptance)
    assert none.over_none == none.bound == 1.0


def test_goals_are_judged_by_what_the_controller_reaches(played: type[Played]) -> None:
    report = run(OPTIONS)
    goals = [
        next(goal for goal in GOALS if goal.metric == metric)
        for metric in ("over_own", "over_fixed", "over_none", "of_bound")
    ]
    goals = [replace(g, case=NGRAM_CASE.name, system="bmc_vllm", against="cpu_attn") for g in goals]
    own, fixed, none, bound = judge(report.rows, None, goals)
    # Of two prompts with 12 tokens each: ours with 3 draft tokens, the others' with 4.
    assert own.value == pytest.approx((2 * 1.4) / (3 * 0.65))
    assert fixed.value == pytest.approx((2 * 0.7) / (3 * 0.65)), "the played controller errs"
    assert none.value == pytest.approx(4 / 1.3)
    assert none.at_floor == pytest.approx(max(4 / 1.3, report.rows[5].bound))
    assert bound.value == pytest.approx(1.0)


def test_outputs_that_differ_fail_or_are_marked(
    played: type[Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "wrong_output", AUTO)
    (failure,) = run(OPTIONS).failures
    assert "BMC, draft tokens auto: 75.0% of the tokens" in failure
    hard = replace(NGRAM_CASE, text=HARD, pair=replace(NGRAM_CASE.pair, shape=TINY))
    report = run(replace(OPTIONS, cases=[hard]))
    assert report.failures == []
    assert "BMC, draft tokens auto" in report.marked[0]


def test_what_does_not_fit_is_named(played: type[Played], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "available_bytes", lambda: 1 << 20)
    report = run(OPTIONS)
    assert report.rows == []
    assert "GB are needed" in report.missing[0]
    assert not played.asked


def test_a_system_that_is_not_installed_is_named_once_a_mode(
    played: type[Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str, mode: str, **settings: str) -> Speculator:
        if name == "cpu_attn":
            raise ImportError("no vllm")
        return Played(name, mode, **settings)

    monkeypatch.setattr(speculation, "make", absent)
    report = run(OPTIONS)
    assert {row.system for row in report.rows} == {"bmc_vllm"}
    assert report.missing == [
        f"{NGRAM_CASE.name}: cpu_attn, draft tokens {mode}: no vllm" for mode in (NONE, "fixed")
    ]


def test_a_quick_list_starts_nothing_when_its_seconds_are_over(played: type[Played]) -> None:
    report = run(replace(OPTIONS, seconds=0.0))
    assert not played.asked
    assert report.missing == [f"{NGRAM_CASE.name}: {speculation.OUT_OF_TIME}"]


def test_document_table_and_picture(
    played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(OPTIONS)._replace(controller=summary([4e-5] * 5))
    report = report._replace(verdicts=judge(report.rows, report.controller, GOALS))
    document = reports.document(report)
    assert document["controller_us"] == pytest.approx(40)
    (judged,) = [goal for goal in document["goals"] if goal["system"] == "controller"]
    assert judged["met"] is True
    auto = document["rows"][-1]
    assert (auto["length"], auto["openmp"], auto["model"]) == ("auto", "libgomp.so.1", "tiny")
    assert json.dumps(document["settings"])
    console = Console(width=180)
    with console.capture() as shown:
        reports.show(report, console, with_goals=True)
    for text in ("mha ngram 4 x 2000: n-gram", "libgomp.so.1", "40 microseconds", "Goals for"):
        assert text in shown.get()
    picture = tmp_path / "tokens.png"
    plot.draw(report, picture)
    assert picture.stat().st_size > 10_000
    with pytest.raises(ValueError, match="no case was measured"):
        plot.draw(report._replace(rows=[]), picture)


def test_the_controller_is_timed() -> None:
    timing = controller.measure()
    assert isinstance(timing, Timing)
    assert 0 < timing.ms < 1e3


TRANSFORMERS = Case(
    "transformers", Pair(replace(SHAPE, layers=4), DRAFT, 0.7), HARD, 1, 40, 24,
    (("dynamic", (NONE, DEFAULT, 3)), ("bmc", (NONE, 3, AUTO))),
)  # fmt: skip


@pytest.mark.parametrize("method", [DRAFT, NGRAM])
def test_transformers_continues_with_draft_tokens(method: str) -> None:
    """Real models: outputs are equal in float32, and draft tokens are counted."""
    case = replace(TRANSFORMERS, pair=replace(TRANSFORMERS.pair, method=method))
    if method == NGRAM:
        systems = (("dynamic", (NONE, 3)), ("bmc", (NONE, 3, AUTO)))
        case = replace(case, text=PLAIN, systems=systems)
    report = run(Options([case], "0", rounds=1, controller=False))
    assert report.failures == report.missing == []
    for row in report.rows:
        assert row.agreement == 1.0
        if row.length == NONE:
            assert (row.tokens_per_step, row.mean_length) == (1.0, 0.0)
        elif row.length == 3:
            assert 0.3 < row.acceptance < 1
            assert 1.5 < row.tokens_per_step <= 4
            assert row.mean_length <= 3
    assert (case.name in report.epsilons) == (method == DRAFT)
