"""The growth benchmark end to end, on generations of a few rows."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import __main__ as command_line
from benchmarks.growth import plot
from benchmarks.growth import report as reports
from benchmarks.growth import run as growth
from benchmarks.growth.cases import Options
from benchmarks.growth.curves import Point, Slope, fitted_growths, judge, slope_of, work_of
from benchmarks.growth.generation import ATTENTIONS, Generator
from benchmarks.growth.run import Report, run
from benchmarks.lib.llama import LlamaShape
from benchmarks.lib.record import write
from benchmarks.lib.timing import Timing
from bmc_core.costs import calibration, measure
from bmc_core.costs.model import Costs, predict
from bmc_core.policy import BMCPolicy

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
TINY = LlamaShape("tiny", 2, 32, 2, 2, 32, 32, 64, "float32")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run over every attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(calibration, "_known", {})
        patch.setattr(measure, "MAX_BYTES", 2 << 20)
        return run(
            Options((12, 24), (3, 20), 1, 2, 2, rows=(4, 8), shape=TINY, calibration_seconds=0.05)
        )


def test_every_r_is_measured_with_every_attention(report: Report) -> None:
    assert report.failures == []
    found = {(c.attention, c.prompt_rows, c.new_rows) for c in report.curves}
    assert found == {(name, p, n) for name in ATTENTIONS for p in (3, 20) for n in (12, 24)}
    for curve in report.curves:
        limit = curve.prompt_rows + curve.new_rows
        assert {4, 8, limit} <= {point.r for point in curve.points}
        assert sum(point.picked for point in curve.points) == 1
        assert sum(point.up_front for point in curve.points) == 1
        for point in curve.points:
            assert 0 < point.timing.best <= point.timing.low <= point.timing.high
            assert point.predicted > 0
            assert len(point.rounds) == len(point.left_out) == 2
            assert sorted(point.left_out) == pytest.approx(sorted(point.rounds)), "one is left"
        assert curve.loss == pytest.approx(curve.picked.timing.ms / curve.fastest.timing.ms - 1)
        assert (curve.measured_best is not None) == (curve.attention == "padded")


def test_a_shorter_generation_is_the_beginning_of_a_longer_one(report: Report) -> None:
    by_length = {
        c.new_rows: c for c in report.curves if (c.attention, c.prompt_rows) == ("sdpa", 3)
    }
    short, long = (by_length[n].points[0] for n in (12, 24))
    assert short.r == long.r == 4
    assert short.timing.ms < long.timing.ms


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("r", [1, 5, 16, 64])
def test_growths_and_tokens(attention: str, r: int) -> None:
    """The real cache grows as the model says, and no attention changes a token."""
    generator = Generator(TINY, 2, 64)
    reference = generator.generate("sdpa", None, 7, 30, None)
    found = generator.generate(attention, BMCPolicy(r=r), 7, 30, None)
    assert torch.equal(found.tokens, reference.tokens)
    assert found.tokens.shape == (2, 31)
    assert len(found.step_seconds) == 30
    options = Options((30,), (7,), 1, 1, 2)
    work = work_of(options, attention, 7, 30)
    costs = Costs(1e-6)
    assert found.growths == predict(BMCPolicy(r=r), work, costs, know_limit=False).growths


def points_of(new: int, copy: float, row: float) -> list[Point]:
    """Times that follow the law exactly."""
    points = []
    for r in (4, 8, 16, 32, 64, 128):
        ms = 1000.0 + copy * (new / r) * new / 2 + row * r * new / 2
        points.append(
            Point(r, new // r, Timing(ms, ms, ms, ms, 2), [ms, ms], [ms, ms], 0.0, False, False)
        )
    return points


def test_the_fit_finds_the_law() -> None:
    lengths, growths = (128, 256, 512), []
    for new in lengths:
        points = points_of(new, 3e-3, 1e-3)
        found = fitted_growths(new, points, [point.timing.ms for point in points])
        assert found == pytest.approx(math.sqrt(new / 3))
        growths.append(found)
    assert slope_of(lengths, growths) == pytest.approx(0.5)
    falling = [600.0 - 100.0 * place for place in range(6)]  # no minimum between the ends
    assert math.isnan(fitted_growths(128, points_of(128, 1.0, 0.0), falling))
    assert math.isnan(slope_of(lengths, [1.0, math.nan, 2.0]))
    assert math.isnan(slope_of([128], [1.0]))


def test_verdicts(report: Report) -> None:
    def slope_met(measured: float, has_goal: bool = True) -> bool | None:
        slope = Slope(16, has_goal, measured, 0.5, 0.7, 0.5)
        verdicts = judge([], [slope], report.record)
        return verdicts[0].met if verdicts else None

    assert slope_met(0.55)
    assert slope_met(0.65) is False
    assert slope_met(math.nan) is False
    assert slope_met(0.5, has_goal=False) is None, "the law is for short prompts"
    losses = {v.case: v for v in report.verdicts if v.goal.metric == "loss"}
    assert len(losses) == len(report.curves)
    for curve in report.curves:
        case = f"{curve.attention}, P {curve.prompt_rows}, N {curve.new_rows}"
        assert losses[case].met == (curve.loss <= 0.05)


class Told:
    """A clock that moves by what it is told when a generation runs."""

    def __init__(self, seconds_per_row: float) -> None:
        self.seconds_per_row = seconds_per_row
        self.now = 0.0
        self.rows: list[int] = []

    def __call__(self) -> float:
        return self.now

    def generate(self, right: Callable) -> Callable:
        def generate(generator, attention, policy, prompt_rows, new_rows, limit):
            self.now += new_rows * self.seconds_per_row
            self.rows.append(new_rows)
            return right(generator, attention, policy, prompt_rows, new_rows, limit)

        return generate


@pytest.mark.parametrize(
    ("seconds_per_row", "lengths", "rounds", "left_out"),
    [
        (1e-6, (6, 12, 24), 2, []),
        (0.5, (6, 12, 24), 1, ["rounds 2 to 2"]),
        (1.2, (6, 12), 1, ["N = 24", "rounds 2 to 2"]),
        (2.0, (6,), 1, ["N = 24", "N = 12", "rounds 2 to 2"]),
        (1e3, (), None, ["N = 24", "N = 12", "N = 6"]),
    ],
)
def test_a_quick_run_ends_in_time_by_construction(
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seconds_per_row: float,
    lengths: tuple[int, ...],
    rounds: int | None,
    left_out: list[str],
) -> None:
    """The longest N goes where one round would not fit, then rounds, and all of them in the end:
    the time is kept whatever a row takes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "measure", lambda g, **k: report.calibration.measured)
    clock = Told(seconds_per_row)
    monkeypatch.setattr(Generator, "generate", clock.generate(Generator.generate))
    found = run(
        Options((6, 12, 24), (3,), 1, 2, 2, ("sdpa",), (4, 8, 16), TINY, seconds=110.0, clock=clock)
    )
    assert found.options.lengths == lengths
    assert [text.split(":")[0] for text in found.missing] == left_out
    counted = {len(point.rounds) for curve in found.curves for point in curve.points}
    assert counted == (set() if rounds is None else {rounds})
    if rounds is None:
        assert clock.rows == [6], "one generation, of the shortest N, told"
    console = Console(width=150)
    with console.capture() as shown:
        reports.show(found, console)
    assert all(text in shown.get() for text in left_out)


def test_wrong_tokens_are_a_failure(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "measure", lambda g, **k: report.calibration.measured)
    right = Generator.generate

    def wrong(self, attention, policy, *arguments):
        found = right(self, attention, policy, *arguments)
        return found if policy is None else found._replace(tokens=found.tokens + 1)

    monkeypatch.setattr(Generator, "generate", wrong)
    options = Options((8,), (3,), 1, 1, 2, attentions=("sdpa",), rows=(4,), shape=TINY)
    failures = run(options).failures
    assert failures
    assert "sdpa, P 3, r 4: 100.0% of the tokens are not those of transformers' own" in failures[0]


def test_json_picture_and_table(report: Report, tmp_path: Path) -> None:
    write(reports.document(report), tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["benchmark"] == "growth"
    assert len(read["curves"]) == len(report.curves)
    losses = [goal for goal in read["goals"] if goal["metric"] == "loss"]
    for curve, goal in zip(read["curves"], losses, strict=True):
        assert goal["met"] == (curve["loss"] <= goal["bound"])
        assert {point["r"] for point in curve["points"]} >= {curve["picked_r"]}
    goals = {slope["prompt_rows"]: slope["has_goal"] for slope in read["slopes"]}
    assert goals == {3: True, 20: False}
    plot.draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    console = Console(width=150)
    with console.capture() as shown:
        reports.show(report._replace(failures=["something is wrong"]), console)
    for word in ("native kernel", "picked r", "log T* over log N", "something is wrong"):
        assert word in shown.get()
    assert "Goals" not in shown.get()
    with console.capture() as shown:
        reports.show(report, console, with_goals=True)
    assert "slower than the fastest r" in " ".join(shown.get().split())


def invoke(*arguments: str) -> tuple[int, str]:
    result = runner.invoke(command_line.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[│╭╮╰╯─\s]+", " ", result.output)


def test_command_line(report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Options] = []

    def known(options: Options, tell) -> Report:
        asked.append(options)
        return report

    monkeypatch.setattr(growth, "run", known)
    rows, picture = tmp_path / "rows.json", tmp_path / "model.png"
    code, _ = invoke("growth", "--json", str(rows), "--plot", str(picture), "--attention", "native")
    assert code == 0
    assert asked[0].attentions == ("native",)
    assert rows.exists()
    assert picture.exists()
    assert invoke("growth", "--cases", "full", "--threads", "1")[0] == 0
    assert asked[1].prompts == (16, 256)
    assert invoke("growth", "--prompt", "3", "--prompt", "7")[0] == 0
    assert asked[2].prompts == (3, 7)
    assert asked[1].attentions == ATTENTIONS
    assert (asked[1].seconds, asked[2].seconds) == (None, 110.0)
    monkeypatch.setattr(growth, "run", lambda options, tell: report._replace(failures=["wrong"]))
    assert invoke("growth")[0] == 1
    monkeypatch.setattr(growth, "run", lambda options, tell: report._replace(curves=[]))
    assert invoke("growth")[0] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention", "flash"], ["--attention", "'flash'", "'padded'", "'native'"]),
        (["--prompt", "0"], ["--prompt is 0", "at least 1 row"]),
        (["--threads", "100000"], ["--threads is 100000", "allowed: 1 to"]),
        (["--cases", "all"], ["--cases", "quick", "full"]),
        (["--json", "/"], ["--json is /", "the name of a file"]),
    ],
)
def test_errors_name_the_option(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr(growth, "run", None)
    code, text = invoke("growth", *arguments)
    assert code == 2
    for word in words:
        assert word in text


def test_old_names_still_work(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Options] = []

    def known(options: Options, tell) -> Report:
        asked.append(options)
        return report

    monkeypatch.setattr(growth, "run", known)
    result = runner.invoke(command_line.app, ["model", "--path", "sdpa", "--batch", "3"])
    assert result.exit_code == 0
    assert result.stderr == "python -m benchmarks model is now called growth\n"
    assert asked[0].attentions == ("sdpa",)
    assert asked[0].batch_size == 3
    assert " model " not in invoke("--help")[1]
    assert "--attention" in invoke("model", "--help")[1]
