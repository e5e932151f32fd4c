"""The sampling benchmark end to end, on small vocabularies."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as command_line
from benchmarks.sampling import command, run
from benchmarks.sampling.cases import TINY
from benchmarks.sampling.run import Options
from benchmarks.sampling.samplers import BMCSide

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_both_sides_are_timed_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CASES", TINY)
    rows = tmp_path / "rows.json"
    arguments = ["sampling", "--seconds", "0", "--threads", "1", "--goals", "--json", str(rows)]
    result = runner.invoke(command_line.app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(rows.read_text())
    kinds = [(row["case"], row["system"]) for row in found["rows"]]
    assert kinds == [(case.name, side) for case in TINY for side in ("bmc", "vllm")]
    assert all(0 < row["ms_min"] <= row["ms"] for row in found["rows"])
    text = re.sub(r"\s+", " ", result.output)
    assert "1k 2x k=2, top-p" in text
    assert "not measured" in text


def test_a_wrong_token_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(BMCSide):
        def sample(self, settings=None):
            output = super().sample(settings)
            output.sampled_token_ids[0, 0] += 1
            return output

    monkeypatch.setattr(run, "SIDES", (Wrong, run.VLLMSide))
    report = run.run(Options(TINY[:1], seconds=0.0))
    assert report.failures == ["BMC is wrong: 1k 2x k=2, top-p: tokens that the seeds do not give"]


def test_cases_that_are_not_there_are_refused() -> None:
    result = runner.invoke(command_line.app, ["sampling", "--only", "nothing"])
    assert result.exit_code == 2
    assert "--only is 'nothing'" in result.output
