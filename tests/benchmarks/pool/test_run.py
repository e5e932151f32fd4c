"""The pool benchmark on small pools: vLLM's real scheduler, no model."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.lib.load import Load, Requests
from benchmarks.pool import plot, report, run
from benchmarks.pool.cases import Admission, systems_for
from bmc_vllm.free_chunks import ChunkedFreeQueue

SMALL = Load("small", 6, 8192, prompts=(60, 400), outputs=(30, 90), prefixes=2)
PLAIN = Load("plain", 6, 8192, prompts=(60, 400), outputs=(30, 90), caching=False)
TALKS = Load("talks", 4, 8192, prompts=(60, 400), outputs=(30, 90), prefixes=0, turns=0.9)


@pytest.fixture(scope="module")
def found() -> run.Report:
    options = run.Options((SMALL, PLAIN, TALKS), systems_for(32, 128), turnovers=6)
    return run.run(options)


def test_a_worn_pool_still_gives_neighbors(found: run.Report) -> None:
    rows = {(row.load.name, row.system.name): row for row in found.rows}
    for load in ("small", "plain", "talks"):
        ours, theirs = rows[load, "bmc"].worn, rows[load, "vllm"].worn
        assert ours.adjacent > 0.6 > 0.5 > theirs.adjacent
        assert ours.growths < 15 < 28 < theirs.growths < 34
        assert ours.spare > theirs.spare
        assert 0.3 < rows[load, "bmc"].attention < 5
        assert rows[load, "vllm_128"].worn.growths < 15
    assert rows["plain", "bmc"].hits == 0 < rows["small", "bmc"].hits
    assert rows["talks", "bmc"].hits > 0.1


def test_admissions_are_the_same(found: run.Report) -> None:
    assert found.failures == []
    assert [one[2:] for one in found.admitted[::2]] == [one[2:] for one in found.admitted[1::2]]
    assert any(one.preempted for one in found.admitted)


def test_withheld_rows_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that counts kept blocks as used admits fewer: the run fails."""
    take = ChunkedFreeQueue._take

    def greedy(self, place, n):
        blocks = take(self, place, n)
        for block in self.get_all_free_blocks()[:2]:
            self.remove(block)
        return blocks

    monkeypatch.setattr(ChunkedFreeQueue, "_take", greedy)
    monkeypatch.setattr(run, "ADMISSIONS", (Admission(101, 32, 60, 20, 10),))
    _, failures = run._admissions(systems_for(32, 128))
    assert len(failures) == 1
    assert "steps" in failures[0]


def test_what_is_written(found: run.Report, tmp_path: Path) -> None:
    document = json.loads(json.dumps(report.document(found)))
    assert [row["system"] for row in document["rows"][:3]] == ["bmc", "vllm", "vllm_128"]
    assert len(document["rows"][0]["turnovers"]) == 6
    assert len(document["admissions"]) == 10
    plot.draw(found, tmp_path / "pool.png")
    assert (tmp_path / "pool.png").stat().st_size > 10_000
    console = Console(width=150, record=True)
    report.show(found, console, with_goals=True)
    text = console.export_text()
    assert "BMC, block 32, r 128" in text
    assert "the same steps" in text


def test_requests_are_the_same_for_everyone() -> None:
    ours, theirs = Requests(TALKS, 3), Requests(TALKS, 3)
    for _ in range(50):
        drawn = ours.draw()
        assert drawn == theirs.draw()
        for requests in (ours, theirs):
            requests.ended([*drawn.prompt, 1])
    assert len(drawn.prompt) > 60
