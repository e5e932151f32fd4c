"""The generate benchmark on a tiny model, with every real system."""

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.engines.transformers import NAMES, Dynamic, build_model, twin
from benchmarks.generate import run as generate
from benchmarks.generate.report import generate_document, show_generate
from benchmarks.generate.run import GOALS, TINY, GenerateCase, Goal, Options, measured_ratio, run
from benchmarks.kernel.report import now

CASE = GenerateCase(2, 40)


def tiny(**fields: Any) -> Options:
    settings: dict[str, Any] = {"threads": 1, "r": 16, "rounds": 3, "shape": TINY}
    return Options([CASE], **{**settings, **fields})


@pytest.fixture(scope="module")
def report() -> generate.GenerateReport:
    return run(tiny())


def test_every_system_is_measured_and_right(report: generate.GenerateReport) -> None:
    assert report.failures == []
    assert report.missing == []
    assert [row.system for row in report.rows] == list(NAMES)
    for row in report.rows:
        # Rows end 6 before a chunk is full: the growth is among the steps that are timed.
        assert row.rows == 32 - 6
        assert row.timing.calls == (6 if row.peer else 17)
        assert row.logits_error < 0.05
        assert row.step_ms >= row.timing.ms
        assert 0 < row.floor_ms < row.step_ms
        counted = row.copied_mb == row.copied_mb
        assert counted != row.peer
    assert all(verdict.measured is None for verdict in report.verdicts)


def test_document_and_tables(report: generate.GenerateReport, capsys) -> None:
    from rich.console import Console

    document = generate_document(report, now())
    assert document["settings"] == {
        "threads": 1, "r": 16, "rounds": 3, "dtype": "bfloat16", "model": "tiny",
    }  # fmt: skip
    ours = next(row for row in document["rows"] if row["system"] == "bmc")
    assert set(ours["ratios"]) == {"dynamic", "static", "deepspeed"}
    assert len(document["goals"]) == len(GOALS)
    console = Console(width=150)
    show_generate(report, console)
    printed = capsys.readouterr().out
    assert "BMC, packed linears" in printed
    assert "DynamicCache is" in printed


def test_a_wrong_cache_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are not what the others got change logits and tokens."""
    from benchmarks.engines.transformers import BMC

    original = BMC.fill
    monkeypatch.setattr(
        BMC,
        "fill",
        lambda self, layer, key, value, steps: original(self, layer, key, -value, steps),
    )
    found = run(tiny(systems=("dynamic", "bmc"), rounds=2)).failures
    assert len(found) == 1
    assert "2 x 40: the logits of BMC differ from dynamic's" in found[0]


def test_different_tokens_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.engines.transformers import BMC

    original = BMC.generate
    monkeypatch.setattr(BMC, "generate", lambda *args: original(*args).flip(1))
    failures = generate.check_tokens(tiny(systems=("dynamic", "bmc")), new=4)
    assert failures == ["greedy float32 tokens of BMC are not those of DynamicCache"]


def test_a_twin_has_the_same_weights() -> None:
    model = build_model(TINY, 64, torch.float32, seed=0)
    other = Dynamic(model).model
    assert other is not model
    assert twin(model).lm_head is not model.lm_head
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_a_case_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "available_bytes", lambda: 1000)
    report = run(tiny(systems=("dynamic", "bmc")))
    assert report.rows == []
    assert "2 x 40: 0.0 GB are needed" in report.missing[0]
    assert "--systems" in report.missing[0]


def test_averages_need_the_whole_grid(report: generate.GenerateReport) -> None:
    rows = [
        row._replace(case=case, step_ms=ms * (1 if row.system == "bmc" else 3))
        for row in report.rows
        if row.system in ("bmc", "dynamic")
        for case, ms in zip(generate.FULL, range(1, 13), strict=True)
    ]
    assert measured_ratio(rows, Goal("bmc", "dynamic", "", 2.0)) == pytest.approx(3.0)
    assert measured_ratio(rows, Goal("bmc", "dynamic", "8 x 2000", 2.0)) == pytest.approx(3.0)
    assert measured_ratio(rows[1:], Goal("bmc", "dynamic", "", 2.0)) is None
    assert measured_ratio(rows, Goal("bmc", "static", "8 x 2000", 2.0)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "bmc,wrong"], "wrong; allowed: dynamic, static"),
        (["--batch", "3"], "both or none"),
        (["--systems", ""], "allowed: dynamic, static"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", *arguments], terminal_width=200)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
