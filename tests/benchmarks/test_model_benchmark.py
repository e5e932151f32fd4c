"""The model benchmark end to end, on generations of a few rows."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command_line
from benchmarks.growth import run as model
from benchmarks.growth.generation import PATHS, Generator, ModelShape
from benchmarks.growth.report import draw_model, model_document, show_model
from benchmarks.growth.run import (
    ModelReport,
    Options,
    Point,
    Slope,
    fitted_growths,
    run,
    slope_of,
)
from benchmarks.kernel.report import write_json
from benchmarks.lib.timing import Timing
from bmc_core.costs import calibration, measure
from bmc_core.policy import BMCPolicy

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
TINY = ModelShape(2, 32, 2, 2, 32, 32, 64)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ModelReport:
    """A run over every path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(calibration, "_known", {})
        patch.setattr(measure, "MAX_BYTES", 2 << 20)
        return run(
            Options((12, 24), (3, 20), 1, 2, 2, rows=(4, 8), shape=TINY, calibration_seconds=0.05)
        )


def test_every_r_is_measured_on_every_path(report: ModelReport) -> None:
    assert report.failures == []
    found = {(c.path, c.prompt_rows, c.new_rows) for c in report.curves}
    assert found == {(path, p, n) for path in PATHS for p in (3, 20) for n in (12, 24)}
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
        assert (curve.measured_best is not None) == (curve.path == "padded")


def test_a_shorter_generation_is_the_beginning_of_a_longer_one(report: ModelReport) -> None:
    by_length = {c.new_rows: c for c in report.curves if (c.path, c.prompt_rows) == ("sdpa", 3)}
    short, long = (by_length[n].points[0] for n in (12, 24))
    assert short.r == long.r == 4
    assert short.timing.ms < long.timing.ms


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("r", [1, 5, 16, 64])
def test_growths_and_tokens(path: str, r: int) -> None:
    """The real cache grows as the model says, and no path changes a token."""
    generator = Generator(TINY, 2, 64)
    reference = generator.generate("sdpa", None, 7, 30, None)
    found = generator.generate(path, BMCPolicy(r=r), 7, 30, None)
    assert torch.equal(found.tokens, reference.tokens)
    assert found.tokens.shape == (2, 31)
    assert len(found.step_seconds) == 30
    options = Options((30,), (7,), 1, 1, 2)
    work = model.work_of(options, path, 7, 30)
    costs = model.Costs(1e-6)
    assert found.growths == model.predict(BMCPolicy(r=r), work, costs, know_limit=False).growths


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


def test_verdicts() -> None:
    assert Slope(16, True, 0.55, 0.5, 0.6, 0.5).met
    assert not Slope(16, True, 0.65, 0.5, 0.7, 0.5).met
    assert Slope(16, True, math.nan, 0.5, 0.7, 0.5).met is False
    assert Slope(256, False, 0.5, 0.5, 0.5, 0.7).met is None, "the law is for short prompts"


def test_wrong_tokens_are_a_failure(
    report: ModelReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "measure", lambda g, **k: report.calibration.measured)
    right = Generator.generate

    def wrong(self, path, policy, *arguments):
        found = right(self, path, policy, *arguments)
        return found if policy is None else found._replace(tokens=found.tokens + 1)

    monkeypatch.setattr(Generator, "generate", wrong)
    options = Options((8,), (3,), 1, 1, 2, paths=("sdpa",), rows=(4,), shape=TINY)
    failures = run(options).failures
    assert failures
    assert "sdpa, P 3, r 4: 100.0% of the tokens are not those of transformers' own" in failures[0]


def test_json_picture_and_table(report: ModelReport, tmp_path: Path) -> None:
    document = model_document(report, "now")
    write_json(document, tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["benchmark"] == "model"
    assert len(read["curves"]) == len(report.curves)
    for curve in read["curves"]:
        assert curve["met"] == (curve["loss"] <= curve["goal"])
        assert {point["r"] for point in curve["points"]} >= {curve["picked_r"]}
    goals = {slope["prompt_rows"]: slope["has_goal"] for slope in read["slopes"]}
    assert goals == {3: True, 20: False}
    draw_model(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    console = command_line._console()
    with console.capture() as shown:
        show_model(report._replace(failures=["something is wrong"]), console)
    for word in ("native kernel", "picked r", "log T* over log N", "something is wrong"):
        assert word in shown.get()


def invoke(*arguments: str) -> tuple[int, str]:
    result = runner.invoke(command_line.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[│╭╮╰╯─\s]+", " ", result.output)


def test_command_line(report: ModelReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Options] = []

    def known(options: Options, tell) -> ModelReport:
        asked.append(options)
        return report

    monkeypatch.setattr(model, "run", known)
    rows, picture = tmp_path / "rows.json", tmp_path / "model.png"
    code, _ = invoke("model", "--json", str(rows), "--plot", str(picture), "--path", "native")
    assert code == 0
    assert asked[0].paths == ("native",)
    assert rows.exists()
    assert picture.exists()
    assert invoke("model", "--cases", "full", "--threads", "1")[0] == 0
    assert asked[1].prompts == (16, 256)
    assert invoke("model", "--prompt", "3", "--prompt", "7")[0] == 0
    assert asked[2].prompts == (3, 7)
    assert asked[1].paths == PATHS
    monkeypatch.setattr(model, "run", lambda options, tell: report._replace(failures=["wrong"]))
    assert invoke("model")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--path", "flash"], ["--path is flash", "padded, sdpa, native"]),
        (["--prompt", "0"], ["--prompt is 0", "at least 1 row"]),
        (["--threads", "100000"], ["--threads is 100000", "allowed: 1 to"]),
        (["--cases", "all"], ["--cases", "quick", "full"]),
        (["--json", "/"], ["--json is /", "the name of a file"]),
    ],
)
def test_errors_name_the_option(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr(model, "run", None)
    code, text = invoke("model", *arguments)
    assert code == 2
    for word in words:
        assert word in text
