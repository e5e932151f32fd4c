"""The step benchmark's cases, and the goals that name them."""

import pytest

from benchmarks.step.cases import CASES, select
from benchmarks.step.run import GOALS


def test_step_cases() -> None:
    assert [case.name for case in select("gqa")] == ["gqa 16x8000"]
    with pytest.raises(ValueError, match="--only is 'none'; allowed: part of one of"):
        select("none")


def test_goals_refer_to_cases_that_exist() -> None:
    assert {goal.case for goal in GOALS} <= {case.name for case in CASES}
    assert {goal.system for goal in GOALS} == {"bmc_vllm"}
