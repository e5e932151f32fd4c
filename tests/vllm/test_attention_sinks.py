"""Attention sinks follow their parameter when weights are written in place."""

import pytest
import torch

from tests.support.engines import engine, generate, prompts_of, worker
from tests.support.models import ModelStore

PROMPTS = prompts_of([40, 70])


def move_sinks(llm, by: float, through_data: bool) -> None:
    for layer in worker(llm).model_runner.model.model.layers:
        sinks = layer.attn.sinks
        with torch.no_grad():
            # What an update of weights in place does, with and without autograd's notice.
            (sinks.data if through_data else sinks).copy_(sinks + by)


@pytest.mark.parametrize("through_data", [False, True], ids=["parameter", "data"])
def test_an_update_in_place_is_seen(model_dir: ModelStore, through_data: bool) -> None:
    tokens: dict[str, list] = {}
    for backend in ("CPU_ATTN", "BMC"):
        # Without prefix caching: cached rows would be those of the old weights.
        settings = {"dtype": "float32", "enable_prefix_caching": False}
        with engine(model_dir("gpt-oss-sinks"), backend, **settings) as llm:
            tokens[backend] = [generate(llm, PROMPTS, max_tokens=24)]
            move_sinks(llm, 6.0, through_data)
            tokens[backend].append(generate(llm, PROMPTS, max_tokens=24))
    assert tokens["BMC"] == tokens["CPU_ATTN"]
    assert tokens["BMC"][0] != tokens["BMC"][1], "the sinks matter"
