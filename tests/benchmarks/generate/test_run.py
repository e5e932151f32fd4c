"""The generate benchmark on a tiny model, with every real engine in this process."""

import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.engines import HUGGING_FACE, base
from benchmarks.generate import report as reports
from benchmarks.generate import run as generate
from benchmarks.generate.cases import FULL, GRID, QUICK, GenerateCase
from benchmarks.generate.run import GOALS, Options, Report, measured_ratio, run
from benchmarks.lib.answers import LOGIT_TOLERANCE
from benchmarks.lib.goals import Goal
from benchmarks.lib.llama import TINY
from benchmarks.lib.timing import Budget

CASE = GenerateCase(2, 40)


def tiny(**fields: Any) -> Options:
    settings: dict[str, Any] = {"threads": 1, "r": 16, "rounds": 3, "shape": TINY}
    return Options([CASE], **{**settings, **fields})


@pytest.fixture(scope="module")
def report() -> Report:
    return run(tiny())


def test_every_system_is_measured_and_right(report: Report) -> None:
    assert report.failures == []
    assert report.missing == []
    assert [row.system for row in report.rows] == list(HUGGING_FACE)
    for row in report.rows:
        # Rows end 6 before a chunk is full: the growth is among the steps that are timed.
        assert row.rows == 32 - 6
        assert row.timing.calls == (6 if row.peer else 16)
        if row.system in ("dynamic", "deepspeed"):
            assert math.isnan(row.logits_error), "others are compared with it"
        else:
            assert row.logits_error < 0.05
        assert row.step_ms >= row.timing.ms
        assert 0 < row.floor.ms < row.step_ms
        counted = row.copied_mb == row.copied_mb
        assert counted != row.peer
    assert all(verdict.value is None for verdict in report.verdicts)


def test_document_and_tables(report: Report) -> None:
    verdicts = generate.judge(report.rows, GOALS)
    document = reports.document(report._replace(verdicts=verdicts))
    assert document["settings"] == {
        "threads": 1, "r": 16, "rounds": 3, "dtype": "bfloat16", "model": "tiny",
    }  # fmt: skip
    ours = next(row for row in document["rows"] if row["system"] == "bmc")
    assert set(ours["ratios"]) == {"dynamic", "static", "deepspeed"}
    assert ours["floor_binds"] in ("reads", "products")
    assert len(document["goals"]) == len(GOALS)
    console = Console(width=150)
    with console.capture() as shown:
        reports.show(report, console)
    assert "BMC, packed linears" in shown.get()
    assert "DynamicCache is" in shown.get()
    assert "Goals" not in shown.get()
    with console.capture() as shown:
        reports.show(report._replace(verdicts=verdicts), console, with_goals=True)
    assert "Goals" in shown.get()


def test_goals_refer_to_cases_and_engines_that_exist() -> None:
    names = {case.name for case in FULL} | {GRID}
    for goal in GOALS:
        assert goal.case in names
        assert goal.system in HUGGING_FACE
        assert goal.against in (*HUGGING_FACE, "llama_cpp")
    assert set(QUICK) <= set(FULL)


def test_a_wrong_cache_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are not what the others got change logits and tokens."""
    from benchmarks.engines.transformers import BMC

    original = BMC.new_cache

    def new_cache(self, max_rows: int):
        cache = original(self, max_rows)
        update = cache.update
        cache.update = lambda key, value, *rest, **more: update(key, -value, *rest, **more)
        return cache

    monkeypatch.setattr(BMC, "new_cache", new_cache)
    found = run(tiny(systems=("dynamic", "bmc"), rounds=2)).failures
    assert len(found) == 1
    assert "2 x 40: the logits of BMC differ from dynamic's" in found[0]


@pytest.mark.parametrize("systems", [("bmc",), ("bmc", "bmc_views"), ("static", "bmc")])
def test_the_reference_is_asked_also_where_it_was_not_chosen(
    monkeypatch: pytest.MonkeyPatch, systems: tuple[str, ...]
) -> None:
    """Values of the wrong sign are found without DynamicCache in the table."""
    from bmc_transformers import BMCCache

    update = BMCCache.update

    def negated(self, key, value, *rest, **more):
        return update(self, key, -value, *rest, **more)

    monkeypatch.setattr(BMCCache, "update", negated)
    found = run(tiny(systems=systems, rounds=2))
    assert [row.system for row in found.rows] == list(systems)
    for row in found.rows:
        ours = row.system != "static"
        assert (row.logits_error > LOGIT_TOLERANCE) == ours
        assert any(f"greedy float32 tokens of {row.title} " in f for f in found.failures) == ours
        assert any(f"the logits of {row.title} differ" in f for f in found.failures) == ours


@pytest.mark.parametrize("systems", [("bmc",), ("dynamic", "bmc_views")])
def test_a_growth_that_loses_rows_is_found_out(
    monkeypatch: pytest.MonkeyPatch, systems: tuple[str, ...]
) -> None:
    """Logits before the turns are right; what is timed after the growth is not."""
    from benchmarks.engines.transformers import BMC

    original = BMC.step

    def step(self, count: int):
        steps = original(self, count)
        if any(step.grew for step in steps):
            self.cache.crop(20)
        return steps

    monkeypatch.setattr(BMC, "step", step)
    found = run(tiny(systems=systems, rounds=2))
    assert found.rows[-1].logits_error > LOGIT_TOLERANCE
    assert any("2 x 40: the logits of BMC" in failure for failure in found.failures)


def test_memory_falls_between_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a case asks for memory, that of the one before it has been given back."""
    held = []
    original = generate.lacking_memory

    def asked(engines, *arguments):
        held.append([getattr(engine, "cache", None) is not None for engine in engines.values()])
        return original(engines, *arguments)

    monkeypatch.setattr(generate, "lacking_memory", asked)
    report = run(replace(tiny(systems=("dynamic", "bmc"), rounds=2), cases=[CASE, CASE]))
    assert len(report.rows) == 4
    assert held == [[False, False]] * 4


def test_memory_is_asked_for_before_an_engine_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.engines.transformers import BMCPacked

    started = []
    original = BMCPacked.start
    monkeypatch.setattr(
        BMCPacked, "start", lambda self, *given: (started.append(given), original(self, *given))
    )
    options = tiny(systems=("bmc_packed",))
    needed = sum(
        engine.fill_bytes(TINY, options.batch(CASE))
        for engine in generate.made(options)[0].values()
    )
    # The rows would fit, the shared weights too, but not the packed copy beside its own.
    monkeypatch.setattr(base, "available_bytes", lambda: needed + 2 * TINY.weight_bytes)
    report = run(options)
    assert report.rows == []
    assert "GB are needed" in report.missing[0]
    assert len(started) == 1, "only the small model whose tokens are compared"


def test_rounds_and_cases_out_of_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second case would take 8 times what the first took, and there is less left."""
    spent = Budget(None)
    monkeypatch.setattr(spent, "left", lambda: 1e-3)
    monkeypatch.setattr(spent, "part", lambda cases_left: Budget(0.0))
    monkeypatch.setattr(generate, "Budget", lambda seconds: spent)
    cases = [CASE, GenerateCase(16, 40)]
    report = run(replace(tiny(systems=("dynamic", "bmc")), cases=cases))
    assert [row.case for row in report.rows] == [CASE] * 2
    assert {row.rounds for row in report.rows} == {1}
    assert [text.split(": the")[0] for text in report.missing] == [
        "2 x 40: rounds 2 to 3",
        "16 x 40",
    ]
    document = reports.document(report)
    assert document["rows"][0]["rounds"] == 1
    assert math.isnan(document["rows"][0]["spread"]), "two samples have none"


def test_nothing_measured_ends_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, settings):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(generate, "make", make)
    result = CliRunner().invoke(app, ["generate", "--systems=dynamic"], terminal_width=200)
    assert result.exit_code == 3
    assert 'pip install "bmc-llm[transformers]"' in " ".join(result.output.split())


def test_a_reference_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, settings):
        if name == "dynamic":
            raise ImportError("no such cache")
        return original(name, settings)

    original = generate.make
    monkeypatch.setattr(generate, "make", make)
    found = run(tiny(systems=("bmc",), rounds=2))
    assert found.failures == ["greedy tokens were not checked: dynamic cannot run here"]
    assert "2 x 40: BMC's logits were not checked: dynamic cannot run here" in found.missing


def test_different_tokens_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.engines.transformers import BMC

    original = BMC.generate
    monkeypatch.setattr(BMC, "generate", lambda *args: original(*args).flip(1))
    failures = generate.check_tokens(tiny(systems=("dynamic", "bmc")), new=4)
    assert failures == ["greedy float32 tokens of BMC are not those of DynamicCache"]


def test_a_case_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "available_bytes", lambda: 1000)
    report = run(tiny(systems=("dynamic", "bmc")))
    assert report.rows == []
    assert "2 x 40: 0.0 GB are needed" in report.missing[0]
    assert "--systems" in report.missing[0]


def test_a_quick_list_out_of_time_names_what_it_left_out() -> None:
    options = replace(tiny(systems=("dynamic", "bmc"), seconds=0.0), cases=[CASE, CASE])
    report = run(options)
    assert report.rows == []
    assert len(report.missing) == 2
    assert "--cases full has no limit" in report.missing[0]


def test_an_engine_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, settings):
        if name == "deepspeed":
            raise ImportError("No module named 'deepspeed'")
        return original(name, settings)

    original = generate.make
    monkeypatch.setattr(generate, "make", make)
    report = run(tiny(systems=("dynamic", "deepspeed"), rounds=2))
    assert [row.system for row in report.rows] == ["dynamic"]
    assert "bmc-llm[deepspeed]" in report.missing[0]


def goal(peer: str, case: str) -> Goal:
    return Goal(case, "ratio", 2.0, against=peer)


def test_averages_need_the_whole_grid(report: Report) -> None:
    rows = [
        row._replace(case=case, step_ms=ms * (1 if row.system == "bmc" else 3))
        for row in report.rows
        if row.system in ("bmc", "dynamic")
        for case, ms in zip(FULL, range(1, 13), strict=True)
    ]
    assert measured_ratio(rows, goal("dynamic", GRID)) == pytest.approx(3.0)
    assert measured_ratio(rows, goal("dynamic", "8 x 2000")) == pytest.approx(3.0)
    assert measured_ratio(rows[1:], goal("dynamic", GRID)) is None
    assert measured_ratio(rows, goal("static", "8 x 2000")) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "bmc,wrong"], "wrong; allowed: dynamic, static"),
        (["--batch", "3"], "both or none"),
        (["--systems", ""], "allowed: dynamic, static"),
        (["--threads", "100000"], "--threads is 100000; allowed: 1 to"),
        (["--rounds", "1"], "--rounds"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", *arguments], terminal_width=200)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
