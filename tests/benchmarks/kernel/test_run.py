"""The kernel benchmark end to end, on cases of a few rows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.kernel import roofline, run
from benchmarks.kernel.operators import Unusable, bmc, sdpa
from benchmarks.kernel.report import document, kernel_table, show
from benchmarks.kernel.run import Options, Report, sets_target
from benchmarks.lib.record import describe, write
from benchmarks.lib.worker_client import WorkerError
from bmc_core import native
from tests.support.kernel_cases import TINY_CASES, tiny_case, tiny_run


def test_every_system_is_timed_and_right(report: Report) -> None:
    assert report.failures == []
    timed = {(row.case.name, row.system) for row in report.rows}
    for case in TINY_CASES:
        assert (case.name, "bmc") in timed
        assert (case.name, "cpu_attn") in timed
        assert ((case.name, "sdpa") in timed) == (case.block_size + case.table_factor == 1)
    for row in report.rows:
        assert row.timing.calls >= 3
        assert row.timing.best <= row.timing.low <= row.timing.ms <= row.timing.high
        assert 0 < row.error < 5e-3


def test_rates_and_ratios_follow_from_the_medians(report: Report) -> None:
    rows = {row.system: row for row in report.rows if row.case.name == "decode"}
    ours, theirs = rows["bmc"], rows["cpu_attn"]
    kv_bytes = (70 + 40) * 2 * 64 * 2 * 2
    assert ours.gb_s == pytest.approx(kv_bytes / (ours.timing.ms * 1e6))
    assert ours.gflops == pytest.approx(4 * 4 * 64 * 110 / (ours.timing.ms * 1e6))
    assert ours.ratios["CPU_ATTN"] == pytest.approx(theirs.timing.ms / ours.timing.ms)
    assert ours.share == pytest.approx(ours.gb_s / ours.read_gb_s)


def test_groups_are_compared(report: Report) -> None:
    width = next(c for c in report.comparisons if c.group == "width" and c.title == "BMC")
    assert width.names == ["width 1", "width 4"]
    assert width.spread == pytest.approx(max(width.ms) / min(width.ms) - 1)


def test_a_quick_run_ends_in_time_by_construction() -> None:
    """Preparing takes 50 s by a clock of its own: two begin within 80, the others are named."""
    calls: list[str] = []

    def clock() -> float:
        return 50.0 * len(calls)

    cases = [tiny_case(name) for name in ("first", "second", "third", "fourth")]
    right = bmc.BMC.prepare

    def prepare(self, case, inputs, threads):
        calls.append(case.name)
        return right(self, case, inputs, threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bmc.BMC, "prepare", prepare)
        report = tiny_run(cases, limit=80.0, clock=clock)
    assert calls == ["first", "second"]
    assert [text.split(":")[0] for text in report.missing] == ["second", "third", "fourth"]
    assert "only 1 of 5 rounds" in report.missing[0]
    assert all("--cases full" in text for text in report.missing)
    rounds = {row.case.name: row.timing.calls for row in report.rows}
    assert rounds == {"first": 5, "second": 1}, "what is prepared late is timed once"
    spreads = {row["case"]: row["spread"] for row in document(report)["rows"]}
    assert spreads["first"] is not None
    assert spreads["second"] is None, "one call has no spread"


def test_goals_are_shown_only_when_asked(report: Report) -> None:
    from rich.console import Console

    console = Console(width=150)
    for asked in (False, True):
        with console.capture() as shown:
            show(report, console, with_goals=asked)
        assert ("Goals for" in shown.get()) == asked


def test_the_refusal_of_a_peer_is_told(report: Report) -> None:
    assert any("VLLM_CPU_ATTN_SPLIT_KV=0" in remark for remark in report.remarks)


def test_json_has_the_fields_of_the_schema(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    write(document(report), path)
    found = json.loads(path.read_text())
    assert found["schema"] == 2
    assert found["benchmark"] == "kernel"
    assert set(found) >= {
        *("machine", "versions", "notes", "remarks", "failures", "rows", "goals", "comparisons")
    }
    assert len(found["rows"]) == len(report.rows)
    assert set(found["versions"]) >= {"torch", "vllm", "bmc"}
    assert found["settings"] == {
        **{"cases": "quick", "only": None, "dtype": None, "limit": None, "pace_python": None},
        **{"threads": 2, "seconds": 0.0, "isa": None},
    }
    assert found["instruction_sets"]["ours"] == native.isa()
    for row in found["rows"]:
        for name in ("ms", "ms_min", "spread", "gb_s", "read_gb_s", "gemm_gflops", "error"):
            assert isinstance(row[name], float), name
        assert row["gflops"] > 0 or row["kind"] == "write"
        assert row["batch"] == len(row["seq_lens"]) == len(row["query_lens"])
        assert set(row) >= {
            *("case", "kind", "query_heads", "kv_heads", "head_size", "rows", "query_rows"),
            *("dtype", "system", "isa", "threads", "ratios", "sets"),
        }
        assert row["floor_ms"] > 0
        assert row["floor_binds"] in ("reads", "products")
        assert row["sets"] * row["set_bytes"] > 1 << 18
    assert {goal["met"] for goal in found["goals"]} == {True, False, None}


def test_table_has_a_line_per_row(report: Report) -> None:
    assert kernel_table(report.rows).row_count == len(report.rows)


def test_picture_is_written(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "roofline.png"
    roofline.draw(report.rows, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="nothing to draw"):
        roofline.draw([row for row in report.rows if row.case.kind == "write"], path)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda out: out.mul_(1.02), id="off by 2 %"),
        pytest.param(lambda out: out[-1:].fill_(float("nan")), id="a row not written"),
    ],
)
def test_a_wrong_answer_makes_the_run_fail(
    run_tiny: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[torch.Tensor], object],
) -> None:
    right = bmc.paged_attention

    def wrong(query, kv_cache, batch, out, **settings) -> None:
        right(query, kv_cache, batch, out, **settings)
        fault(out)

    monkeypatch.setattr(bmc, "paged_attention", wrong)
    report = run_tiny([tiny_case()])
    assert len(report.failures) == 1
    assert "BMC is wrong" in report.failures[0]
    assert [row.ok for row in report.rows] == [False, True, True]


def test_a_write_that_does_nothing_is_found(
    run_tiny: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa._SdpaTrial, "write", lambda self, number: None)
    assert "sdpa is wrong" in run_tiny([tiny_case(kind="write")]).failures[0]


def test_forced_instruction_set_is_used_and_undone(run_tiny: Callable[..., Report]) -> None:
    before = native.isa()
    # vLLM's build for it may be loaded in this process already: only the same one can be forced.
    report = run_tiny([tiny_case()], isa=before)
    assert {row.isa for row in report.rows if row.system == "bmc"} == {before}
    assert native.isa() == before


def test_sets_are_four_caches_or_what_memory_allows() -> None:
    machine = describe()._replace(l3_bytes=32 << 20, l3_known=True, available_bytes=8 << 30)
    notes: list[str] = []
    assert sets_target(machine, 3, notes) == 128 << 20
    assert notes == []
    capped = sets_target(machine._replace(available_bytes=300 << 20), 3, notes)
    assert capped == 50 << 20
    assert "capped at 50% of the available memory" in notes[0]


def test_pace_python_without_the_package_is_an_error(run_tiny: Callable[..., Report]) -> None:
    import sys

    with pytest.raises(Unusable, match="--pace-python .*pace-vllm is not installed"):
        run_tiny([tiny_case()], pace_python=Path(sys.executable))
    with pytest.raises(Unusable, match="--pace-python .*does not start"):
        run_tiny([tiny_case()], pace_python=Path("/does/not/exist"))


class DyingPeer(sdpa.Sdpa):
    """A peer in a process of its own that is killed after so many calls; it stays dead."""

    title = "SlabPool"

    def __init__(self, arena, calls: int = 3) -> None:
        super().__init__(arena)
        self.left = calls

    def prepare(self, case, inputs, threads):
        trial = super().prepare(case, inputs, threads)
        attend = trial.attend

        def dying(number: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise WorkerError("SlabPool: the process ended with SIGKILL; it printed:\nx")
            attend(number)

        trial.attend = dying
        return trial


@pytest.mark.parametrize("calls", [3, 6], ids=["timed", "checked again"])
def test_a_peer_that_is_killed_costs_its_own_figures_only(
    monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    monkeypatch.setattr(run, "Sdpa", lambda arena: DyingPeer(arena, calls))
    report = tiny_run([tiny_case("first"), tiny_case("second")])
    timed = [(row.case.name, row.title) for row in report.rows]
    assert timed == [(name, title) for name in ("first", "second") for title in ("BMC", "CPU_ATTN")]
    assert all("SlabPool" not in row.ratios for row in report.rows)
    assert report.missing == [
        f"{name}: SlabPool fails: SlabPool: the process ended with SIGKILL; it printed:"
        for name in ("first", "second")
    ]
    assert report.failures == []


def test_bmc_that_fails_in_a_timed_call_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = bmc.paged_attention, []

    def failing(*arguments, **settings) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no")
        right(*arguments, **settings)

    monkeypatch.setattr(bmc, "paged_attention", failing)
    report = tiny_run([tiny_case()])
    assert report.failures == ["tiny: BMC fails: no"]
    assert [row.title for row in report.rows] == ["CPU_ATTN", "sdpa"]


def test_options_have_defaults() -> None:
    assert Options(cases=[tiny_case()], threads=1).min_rounds >= 5
