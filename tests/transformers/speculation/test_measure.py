"""What forwards cost, measured on the model itself."""

from __future__ import annotations

import time

import pytest
import torch

from bmc_transformers import enable, speculation_stats
from bmc_transformers.speculation.measure import (
    DRAFT_ROWS,
    TARGET_ROWS,
    forward_costs,
    step_costs,
)
from tests.support.architectures import build, generated, prompt


@pytest.mark.parametrize("name", ["llama", "opt", "mistral", "gpt2"])
def test_curves_rise_from_one_row(name: str) -> None:
    model = enable(build(name), 16)
    costs = forward_costs(model, prompt(1), rows=TARGET_ROWS, seconds=0.2)
    for points in costs:
        assert points[0][0] == 1
        assert points[-1][0] == 16
        seconds = [taken for _, taken in points]
        assert seconds == sorted(seconds)
    assert costs.forward[0][1] > 0
    both = step_costs(costs, forward_costs(model, prompt(1), rows=DRAFT_ROWS, seconds=0.1))
    assert both.draft[0] == (1, both.draft[0][1])
    assert both.draft[0][1] > 0
    assert step_costs(costs, None).draft == ()


def test_it_ends_in_time_and_draws_no_numbers() -> None:
    model = build("llama")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    begun = time.perf_counter()
    forward_costs(model, prompt(1), rows=TARGET_ROWS, seconds=0.0)
    assert time.perf_counter() - begun < 5
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_cannot_be_measured_speculates_all_the_same(caplog) -> None:
    model = enable(build("llama"), 16, speculate="auto")
    stock = generated(build("llama"), {"inputs": prompt(1)})
    failing = iter([True])

    def fails_once(module, args, kwargs) -> None:
        if kwargs["input_ids"].shape[1] == 16 and next(failing, False):
            raise RuntimeError("no such rows today")

    model.register_forward_pre_hook(fails_once, with_kwargs=True)
    output = generated(model, {"inputs": prompt(1), "prompt_lookup_num_tokens": 4})
    assert torch.equal(output.sequences, stock.sequences)
    assert speculation_stats(model).rounds > 0
    assert "learned from the clock alone" in caplog.text
