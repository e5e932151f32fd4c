"""What each step took, told to the scheduler with the step's output.

Promises a few microseconds a step. Knows nothing of what the figures are for.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from bmc_core.speculation import StepCosts, StepTimes
from bmc_vllm.drafters.drafting import Drafting

STEP_TIMES = "bmc_step_times"
"""Attribute of a ModelRunnerOutput: the `StepTimes` of its step."""
STEP_COSTS = "bmc_step_costs"
"""Attribute of the first ModelRunnerOutput after a calibration: its `StepCosts`."""


class StepClock:
    """Times `execute_model` and `sample_tokens` of a runner from here on.

    Attributes:
        costs: go out with the next output.
    """

    def __init__(self, drafting: Drafting) -> None:
        self.costs: StepCosts | None = None
        self._drafting = drafting
        self._forward = 0.0
        runner = drafting.runner
        self._execute_model = runner.execute_model
        self._sample_tokens = runner.sample_tokens
        runner.execute_model = self.execute_model
        runner.sample_tokens = self.sample_tokens

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = self._execute_model(*args, **kwargs)
        self._forward = time.perf_counter() - start
        return output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = self._sample_tokens(*args, **kwargs)
        taken = time.perf_counter() - start
        # vLLM gives one object for all steps without tokens.
        if isinstance(output, ModelRunnerOutput) and output is not EMPTY_MODEL_RUNNER_OUTPUT:
            drafting = self._drafting
            sampling = max(0.0, taken - drafting.seconds - drafting.catch_up_seconds)
            times = StepTimes(self._forward, sampling, drafting.seconds, drafting.steps)
            setattr(output, STEP_TIMES, times)
            if self.costs is not None:
                setattr(output, STEP_COSTS, self.costs)
                self.costs = None
        return output
