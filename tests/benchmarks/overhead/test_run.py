"""The overhead benchmark end to end, for as long as a few rounds take."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as command_line
from benchmarks.overhead import run as overhead
from benchmarks.overhead.layers import BMCLayer, CPUAttnLayer, Inputs, NativePart
from benchmarks.overhead.run import Options, run

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_every_side_is_timed_and_judged(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    result = runner.invoke(
        command_line.app, ["overhead", "--seconds", "0", "--goals", "--json", str(rows)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(rows.read_text())
    kinds = [(row["system"], row["work"]) for row in found["rows"]]
    assert kinds == [
        (side, work)
        for side in ("bmc", "bmc_native", "cpu_attn")
        for work in ("write", "attend", "write and attend")
    ]
    assert all(0 < row["us_min"] <= row["us"] for row in found["rows"])
    (goal,) = found["goals"]
    assert goal["value"] == found["rows"][2]["us"]
    text = re.sub(r"\s+", " ", result.output)
    assert "CPU_ATTN write" in text
    assert "<= 8 µs" in text


@pytest.mark.parametrize("side", [BMCLayer, NativePart, CPUAttnLayer])
def test_a_wrong_answer_fails_the_run(side: type, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(side):
        def attend(self) -> None:
            super().attend()
            self.out[0, 3] += 0.5

    monkeypatch.setattr(overhead, "SIDES", (Wrong,))
    report = run(Options(seconds=0.0, calls=1))
    assert [text.split(" is wrong")[0] for text in report.failures] == [side.title]


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    result = runner.invoke(command_line.app, ["overhead", "--isa", "mmx"])
    assert result.exit_code == 2
    assert "--isa is mmx" in result.output


def test_the_row_of_the_step_is_written() -> None:
    """Without it the answer is another one."""
    for side in (BMCLayer, NativePart, CPUAttnLayer):
        layer = side(Inputs())
        layer.load()
        layer.attend()
        assert not bool((layer.out.float() - layer.inputs.reference).abs().max() < 5e-2)
