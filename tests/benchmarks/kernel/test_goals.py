"""Goals of the kernel benchmark: what they name, how their figures follow from the rows."""

from dataclasses import replace

import pytest

from benchmarks.kernel import cases
from benchmarks.kernel.goals import GOALS, compare, judge
from benchmarks.kernel.run import Report
from benchmarks.lib.goals import Goal, holding
from benchmarks.lib.instruction_sets import InstructionSets

pytestmark = pytest.mark.run
ANY = InstructionSets("portable", "avx2")


def test_goals_refer_to_cases_that_exist() -> None:
    full = cases.select("full", 2)
    names = {case.name for case in full} | {case.group for case in full}
    for goal in GOALS:
        assert goal.case in names
        assert goal.metric != "cost" or goal.against in names
        assert goal.metric != "ratio" or goal.against in ("CPU_ATTN", "SlabPool")


def test_which_goals_hold_for_which_instruction_sets() -> None:
    """Without bfloat16 instructions no more is asked than to be no slower than CPU_ATTN forced to
    the same; the portable code has none; the Zen 5's are not held against AMX."""
    zen, amx, avx2, portable = (
        holding(GOALS, InstructionSets(isa, isa if isa != "portable" else "avx2"))
        for isa in ("avx512_bf16", "amx_bf16", "avx2", "portable")
    )
    assert portable == []
    assert {goal.bound for goal in avx2 if goal.metric == "ratio"} == {1.0}
    avx512 = holding(GOALS, InstructionSets("avx512", "avx512"))
    for lower in (avx512, avx2):
        held = {goal.case for goal in lower if goal.metric == "ratio"}
        kinds = ("decode", "verification", "prefill", "mixed")
        assert held == {case.name for case in cases.quick_cases() if case.kind in kinds}
        assert len([goal for goal in lower if goal.metric == "cost" and goal.bound > 0.1]) == 4
    verification = "verification 8x2048 q5 h32/8 d128"
    bounds = [
        goal.bound
        for goals in (zen, amx)
        for goal in goals
        if (goal.case, goal.metric) == (verification, "ratio")
    ]
    assert bounds == [4.5, 1.78]
    assert not any(goal.metric == "gflops" for goal in amx)


def test_goals_are_judged(report: Report) -> None:
    met = {(v.case, v.goal.metric): v.met for v in report.verdicts}
    assert met["decode", "read_share"] is True
    assert met["decode", "ratio"] is False
    assert met["decode", "cost"] is None, "the case it refers to was not measured"
    assert met["write", "cost"] is True
    assert met["width", "spread"] is True
    assert len([v for v in report.verdicts if v.case == "width"]) == 1
    beyond = {(v.case, v.goal.metric): v.below_floor for v in report.verdicts}
    assert not any(beyond.values()), "products of 128 x 128 tell no floor"
    rows = [row._replace(gemm_told=True) for row in report.rows]
    told = judge(rows, report.comparisons, ANY, report.options.goals)
    beyond = {(v.case, v.goal.metric): v.below_floor for v in told}
    assert beyond["decode", "ratio"], "a thousand million times as fast"
    assert not beyond["decode", "read_share"]
    assert not beyond["write", "cost"]


def test_efficiency_is_of_every_thread_count(report: Report) -> None:
    rows = [row for row in report.rows if row.case.group == "threads"]
    two = [
        row._replace(threads=2, timing=row.timing._replace(ms=row.timing.ms / 1.5)) for row in rows
    ]
    goal = Goal("threads", "efficiency", 0.9)
    (alone,) = judge(rows, compare(rows), ANY, [goal])
    assert (alone.case, alone.met) == ("threads", None), "one thread is compared with nothing"
    two = [row._replace(case=replace(row.case, name="thread 2", kind="prefill")) for row in two]
    (verdict,) = judge([*rows, *two], compare(rows), ANY, [goal])
    assert verdict.case == "thread 2"
    assert verdict.value == pytest.approx(0.75)
    assert verdict.met is False
    full = [
        row._replace(case=replace(row.case, name="thread 2", kind="decode"), read_gb_s=1e-9)
        for row in two
    ]
    (verdict,) = judge([*rows, *full], compare(rows), ANY, [goal])
    assert verdict.value == pytest.approx(0.75), (
        "what was measured, though the bandwidth is reached"
    )
    assert verdict.met is True


def test_few_calls_and_other_cases_have_no_verdict(report: Report) -> None:
    rows = [row._replace(timing=row.timing._replace(calls=4)) for row in report.rows]
    verdicts = judge(rows, report.comparisons, ANY, report.options.goals)
    assert [v.goal for v in verdicts] == list(report.options.goals)
    assert {v.met for v in verdicts} == {None}
    (other,) = judge(report.rows, [], ANY, [Goal("not run", "gflops", 1.0)])
    assert (other.case, other.met) == ("not run", None)


@pytest.mark.parametrize(
    ("name", "metric", "gemm_gflops", "below"),
    [
        ("decode 1x16384 h32/1 d128", "read_share", 400.0, True),
        ("decode 1x16384 h32/1 d128", "read_share", 4000.0, False),
        ("prefill 1x2048 q2048 h32/8 d128", "gflops", 472.0, True),
        ("prefill 1x2048 q2048 h32/8 d128", "gflops", 890.0, False),
    ],
)
def test_goals_of_a_faster_machine_are_marked(
    report: Report, name: str, metric: str, gemm_gflops: float, below: bool
) -> None:
    """32 query heads on one KV head are bound by products where there is no AMX."""
    (case,) = (case for case in cases.quick_cases() if case.name == name)
    ours = next(row for row in report.rows if row.system == "bmc")
    row = ours._replace(case=case, read_gb_s=40.0, gemm_gflops=gemm_gflops, gemm_told=True)
    zen = InstructionSets("avx512_bf16", "avx512_bf16")
    verdicts = [
        v for v in judge([row], [], zen, GOALS) if (v.case, v.goal.metric) == (name, metric)
    ]
    assert [v.below_floor for v in verdicts] == [below]
    assert row.floor.binds == ("reads" if "decode" in name and not below else "products")
