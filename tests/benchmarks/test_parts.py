"""Cases, inputs, timing, machine, children and the comparison of whole steps."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernel import cases
from benchmarks.kernel.inputs import Inputs, layout
from benchmarks.kernel.operators import cpu_attn
from benchmarks.lib import ceilings as machine
from benchmarks.lib.answers import relative_error
from benchmarks.lib.timing import Timed, alternate, summary
from benchmarks.lib.worker_client import WorkerError, WorkerProcess
from benchmarks.step import cases as step_cases
from benchmarks.step import run as step
from tests.support.kernel_cases import tiny_case


def test_names_are_unique_and_lists_nest() -> None:
    quick, full = (cases.select(name, 8) for name in ("quick", "full"))
    assert len({case.name for case in full}) == len(full)
    assert {case.name for case in quick} < {case.name for case in full}
    assert cases.select("full", 1)
    assert all(len({c.group for c in batch}) == 1 for batch in cases.batches(full))


def test_goals_refer_to_cases_that_exist() -> None:
    names = {case.name for case in cases.select("quick", 2)}
    for case in cases.goal_cases():
        for goal in case.goals:
            assert goal.metric != "cost" or goal.against in names


def test_fp8_inputs_are_exact_and_only_peers_may_be_coarse() -> None:
    case = replace(tiny_case(), name="tiny fp8", cache="fp8_e4m3")
    inputs = Inputs(case)
    for rows in (inputs.key, inputs.value):
        assert torch.equal(rows.to(torch.float8_e4m3fn).to(rows.dtype), rows)
    assert case.row_bytes == case.kv_heads * case.head_size * 2
    assert case.tolerance(peer=False) == cases.TOLERANCE[case.dtype] < case.tolerance(peer=True)
    assert tiny_case().tolerance(peer=True) == cases.TOLERANCE[tiny_case().dtype]


def test_bytes_and_operations() -> None:
    case = cases.PREFILL
    assert case.kv_bytes == 2048 * 8 * 128 * 2 * 2
    assert case.flops == 4 * 32 * 128 * (2048 * 2049 // 2)
    assert cases.GQA.flops == 4 * 32 * 128 * 8 * 2048
    assert replace(cases.GQA, kind="write").kv_bytes == 8 * 8 * 128 * 2 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slow", 2), "--cases is 'slow'; allowed: quick, full"),
        (("quick", 2, "no such case"), "--only is 'no such case'; allowed: part of one of"),
        (("quick", 2, "("), "--only is '\\(', no regular expression"),
        (("quick", 2, None, "int8"), "--dtype is 'int8'; allowed: bfloat16, float16, float32"),
    ],
)
def test_bad_selections(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cases.select(*arguments)


def test_selection() -> None:
    only = cases.select("quick", 2, "^width")
    assert len(only) == 5, "not in quick: the full list is searched"
    halves = cases.select("quick", 2, None, "float16")
    assert {case.dtype for case in halves} == {"float16"}
    assert any(case.goals for case in halves)
    assert len({case.inputs_key for case in halves if case.kind == "decode"}) == len(
        [case for case in halves if case.kind == "decode"]
    )


def test_goals_of_a_forced_instruction_set() -> None:
    quick = cases.goal_cases()
    assert cases.with_goals_of(quick, "avx512_bf16") == quick
    for case in cases.with_goals_of(quick, "avx2"):
        assert all(g == cases.Goal("ratio", 1.0, "CPU_ATTN") or g.at_most for g in case.goals)
        assert case.goals
    assert not any(case.goals for case in cases.with_goals_of(quick, "portable"))


def test_reference_is_attention() -> None:
    inputs = Inputs(tiny_case(dtype="float32", seq_lens=(9,), query_lens=(4,)), seed=1)
    query, key, value = (x.transpose(0, 1) for x in (inputs.query, inputs.key, inputs.value))
    mask = torch.ones(4, 9, dtype=torch.bool).tril(5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )
    assert relative_error(inputs.reference.transpose(0, 1), expected) < 1e-6
    assert relative_error(torch.full((2,), float("nan")), torch.ones(2)) == float("inf")


def test_inputs_are_fresh() -> None:
    assert not torch.equal(Inputs(tiny_case()).query, Inputs(tiny_case()).query)


@pytest.mark.parametrize("run_rows", [0, 32, 64, 128])
def test_layout_gives_every_row_a_place_of_its_own(run_rows: int) -> None:
    case = tiny_case(seq_lens=(300, 70, 1), query_lens=(1, 1, 1), run_rows=run_rows)
    table, slots, blocks = layout(replace(case, table_factor=3), 32, seed=5)
    assert table.shape == (3, 30)
    assert slots.unique().numel() == slots.numel() == 371
    assert slots.min() >= 32, "block 0 is nobody's"
    assert slots.max() < blocks * 32
    steps = slots[:300].diff()
    if run_rows:
        inside = steps[[i for i in range(299) if (i + 1) % run_rows]]
        assert (inside == 1).all()
    else:
        assert (steps == 1).all()


class Sleeper(Timed):
    def __init__(self, seconds: float, threads: int = 1) -> None:
        self.seconds, self.threads = seconds, threads
        self.entered = 0
        self.indices: list[int] = []

    def enter(self) -> None:
        self.entered += 1

    def call(self, index: int) -> None:
        self.indices.append(index)
        time.sleep(self.seconds)


def test_alternate_takes_turns() -> None:
    trials = [Sleeper(0.001), Sleeper(0.004)]
    fractions: list[float] = []
    fast, slow = alternate(trials, 0.0, min_rounds=4, tick=fractions.append)
    assert fast.calls == slow.calls == 4
    assert fast.ms < slow.ms
    assert trials[1].indices == [0, 1, 2, 3]
    assert [trial.entered for trial in trials] == [1, 0]
    assert fractions[-1] == 1.0


def test_no_trial_always_follows_the_same_one() -> None:
    turns: list[int] = []

    class Noted(Sleeper):
        def call(self, index: int) -> None:
            turns.append(trials.index(self))

    trials = [Noted(0.0) for _ in range(3)]
    alternate(trials, 0.0, min_rounds=12, max_rounds=12)
    rounds = [turns[i : i + 3] for i in range(1, len(turns), 3)]  # after the first, untimed call
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert {turns[i - 1] for i in range(2, len(turns)) if turns[i] == 0} >= {1, 2}


def test_trials_over_the_same_memory_begin_apart() -> None:
    trials = [Sleeper(0.0), Sleeper(0.0)]
    trials[1].first_set = 7
    alternate(trials, 0.0, min_rounds=3, max_rounds=3)
    assert [trial.indices for trial in trials] == [[-1, 0, 1, 2], [7, 8, 9]]


def test_a_change_of_threads_costs_an_untimed_call() -> None:
    trials = [Sleeper(0.0, threads=1), Sleeper(0.0, threads=2)]
    timings = alternate(trials, 0.0, min_rounds=3, max_rounds=3)
    assert [t.calls for t in timings] == [3, 3]
    assert sum(len(trial.indices) for trial in trials) > 6


def test_summary() -> None:
    timing = summary([0.001, 0.002, 0.003, 0.004, 0.1])
    assert (timing.ms, timing.low, timing.high, timing.best) == (3.0, 2.0, 4.0, 1.0)
    assert timing.spread == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one"):
        summary([])


def test_ceilings_are_positive_and_kept() -> None:
    ceilings = machine.Ceilings(1 << 20, rounds=2, gemm_size=128)
    threads = torch.get_num_threads()
    for count in (1, 2):
        assert ceilings.read(count).rate > 0
        assert ceilings.read(count).method
    for dtype in cases.ELEMENT_BYTES:
        assert ceilings.gemm(1, dtype).rate > 0
    before = ceilings.read(1)
    assert ceilings.read(1) is before
    ceilings.measure_again()
    assert ceilings.read(1).rate >= before.rate
    assert torch.get_num_threads() == threads


def test_every_way_of_reading_runs() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        methods = machine.read_methods(torch.zeros(1 << 20, dtype=torch.uint8), pool)
        assert len(methods) >= 4
        for method in methods.values():
            method()


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found.cpu
    assert found.cores >= 1
    assert found.l3_bytes > 0
    assert found.available_bytes > 0


@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_attn_kernel_is_the_one_that_vllm_takes(head_size, block_size, dtype) -> None:
    vllm = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    ours = cpu_attn.kernel_name(cpu_attn.build_for_this_machine(), dtype, block_size, head_size)
    assert ours == vllm._get_attn_isa(dtype, block_size, head_size)


def python_child(code: str) -> WorkerProcess:
    return WorkerProcess("the child", [sys.executable, "-c", code])


def test_child_answers() -> None:
    child = python_child("import sys\nfor line in sys.stdin: print(line, end='', flush=True)")
    assert child.ask(30, do="x", n=1) == {"do": "x", "n": 1}
    child.close()
    child.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no such engine')", "exit code 1; it printed:\nno such engine"),
        ("import os; os.abort()", "SIGABRT"),
        ('input(); print(\'{"error": "out of rows"}\', flush=True); input()', "out of rows"),
        ("import time; time.sleep(60)", "no answer in 1 seconds"),
    ],
)
def test_child_that_fails_says_why(code: str, message: str) -> None:
    child = python_child(code)
    with pytest.raises(WorkerError, match=message):
        child.ask(1 if "sleep" in code else 30, do="x")
    child._process.kill()
    child.close()


def test_steps_agree_until_the_first_difference() -> None:
    assert step.agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(4 / 6)
    assert step.agreement([[]], [[]]) == 1.0


def test_both_engines_get_the_same_environment(tmp_path: Path) -> None:
    environment = step.environment("0-1", tmp_path)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert "libgomp" in environment["LD_PRELOAD"]


def test_step_cases() -> None:
    assert [case.name for case in step_cases.select("gqa")] == ["gqa 16x8000"]
    with pytest.raises(ValueError, match="--only is 'none'; allowed: part of one of"):
        step_cases.select("none")
    assert step_cases.MHA.row_bytes == 8 * 32 * 64 * 2 * 2
    assert 0.9e9 < step_cases.MHA.weight_bytes < 1.2e9


def test_a_case_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "available_bytes", lambda: 1 << 30)
    options = step.Options(step_cases.CASES, "0")
    with pytest.raises(MemoryError, match="mha 8x2000: two engines need .* leave the case out"):
        step.run(options)
