"""The speculation benchmark's cases, the goals that name them, and the prompts."""

import pytest

from benchmarks.engines.speculating.base import AUTO, NONE
from benchmarks.lib.chain import continuation
from benchmarks.speculation import models
from benchmarks.speculation.cases import CONTROLLER, DEMO, FULL, MIXED, PLAIN, QUICK, select
from benchmarks.speculation.run import GOALS, num_cpus


def test_cases_are_chosen_by_name() -> None:
    assert [case.name for case in select(FULL, "gqa")[0]] == ["gqa ngram 1 x 8000"]
    assert select(FULL, "gqa")[1] is False
    assert select(FULL, "controller") == ([], True)
    assert select(QUICK, None) == (list(QUICK), True)
    with pytest.raises(ValueError, match="--only is 'none'; allowed: part of one of"):
        select(FULL, "none")
    with pytest.raises(ValueError, match="no regular expression"):
        select(FULL, "(")


def test_goals_refer_to_what_is_measured() -> None:
    by_name = {case.name: case for case in FULL}
    for goal in GOALS:
        if goal.case == CONTROLLER:
            continue
        systems = dict(by_name[goal.case].systems)
        assert AUTO in systems[goal.system]
        if goal.metric == "over_own":
            assert any(length != NONE for length in systems[goal.against])
        elif goal.metric in ("over_none", "of_bound"):
            assert NONE in systems[goal.system]


@pytest.mark.parametrize(("bind", "count"), [("0", 1), ("0-1", 2), ("0-3,8", 5)])
def test_threads_are_the_cpus_of_a_list(bind: str, count: int) -> None:
    assert num_cpus(bind) == count


def test_names_are_unique() -> None:
    names = [case.name for case in (*QUICK, *FULL)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", [c for c in (*QUICK, *FULL) if c.pair.shape is not DEMO],
                         ids=lambda case: case.name)  # fmt: skip
def test_prompts_are_as_long_as_the_case_says(case) -> None:
    prompts = models.prompts(case)
    assert [len(prompt) for prompt in prompts] == [case.rows] * case.batch
    half = case.pair.shape.vocabulary // 2
    plain = [prompt[-1] < half for prompt in prompts]
    if case.text == MIXED:
        assert plain == [number % 2 == 0 for number in range(case.batch)]
    else:
        assert plain == [case.text == PLAIN] * case.batch
    for prompt in prompts:
        if prompt[-1] < half:
            said = continuation(case.pair.shape.vocabulary, prompt, case.new)
            held = len(set(said) & set(prompt))
            assert held == case.new, "the prompt must hold all that n-gram is to find"
