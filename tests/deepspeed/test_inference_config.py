"""kv_policy and kv_policy_config: every way to give them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import init_inference
from deepspeed.inference.config import DeepSpeedInferenceConfig as StockConfig
from pydantic import ValidationError

import bmc_transformers
from tests.support import tiny_decoders

SETTINGS = {"dtype": "fp32", "kv_policy": "bmc", "kv_policy_config": {"r": 48}}


def growth_of(engine: Any) -> int:
    """Rows of the first growth: r, where the prompt is shorter."""
    with torch.no_grad():
        cache = engine(tiny_decoders.prompts(1, 4), use_cache=True).past_key_values
    assert isinstance(cache, bmc_transformers.BMCCache)
    return int(cache.policy.rows_to_hold(0, 1))


def test_by_keyword() -> None:
    engine = init_inference(
        tiny_decoders.make("llama-gqa"),
        dtype=torch.float32,
        kv_policy="bmc",
        kv_policy_config={"r": 48},
    )
    assert growth_of(engine) == 48


def test_by_dict() -> None:
    engine = init_inference(tiny_decoders.make("llama-gqa"), config=dict(SETTINGS))
    assert growth_of(engine) == 48


def test_by_json_file(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    path.write_text(json.dumps(SETTINGS))
    engine = init_inference(tiny_decoders.make("llama-gqa"), config=str(path))
    assert growth_of(engine) == 48


def test_dict_and_keyword_together() -> None:
    engine = init_inference(
        tiny_decoders.make("llama-gqa"),
        config={"dtype": "fp32", "kv_policy": "bmc"},
        kv_policy_config={"r": 80},
    )
    assert growth_of(engine) == 80


def test_dtype_is_deepspeeds() -> None:
    engine = init_inference(tiny_decoders.make("llama-gqa"), dtype=torch.bfloat16, kv_policy="bmc")
    with torch.no_grad():
        step = engine(tiny_decoders.prompts(1, 4), use_cache=True)
    assert step.logits.dtype is torch.bfloat16
    assert step.past_key_values.layers[0].keys.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"kv_policy": "bcm"}, ("kv_policy\n", "'bcm'", "should be 'bmc'")),
        ({"kv_policy": "auto"}, ("kv_policy\n", "'auto'", "should be 'bmc'")),
        ({"kv_polcy": "bmc"}, ("kv_polcy\n", "Extra inputs are not permitted")),
        (
            {"kv_policy": "bmc", "kv_policy_config": {"rows": 4}},
            ("kv_policy_config\n", "'rows'", "r, T, attention, pack_linears"),
        ),
        (
            {"kv_policy": "bmc", "kv_policy_config": {"r": 0}},
            ("kv_policy_config.r", "greater than or equal to 1", "'auto'", "input_value=0"),
        ),
        (
            {"kv_policy": "bmc", "kv_policy_config": {"r": "128"}},
            ("kv_policy_config.r", "valid integer", "'auto'", "input_value='128'"),
        ),
        (
            {"kv_policy": "bmc", "kv_policy_config": {"r": True}},
            ("kv_policy_config.r", "valid integer", "input_value=True"),
        ),
        (
            {"kv_policy": "bmc", "kv_policy_config": {"T": -1}},
            ("kv_policy_config.T", "greater than or equal to 1"),
        ),
        (
            {"kv_policy": "bmc", "kv_policy_config": {"T": "auto"}},
            ("kv_policy_config.T", "valid integer", "input_value='auto'"),
        ),
        (
            {"kv_policy": "bmc", "kv_policy_config": {"r": "auto", "T": 4}},
            ("kv_policy_config\n", "r='auto' and T=4", "allowed: one of them"),
        ),
        (
            {"kv_policy": "bmc", "kv_policy_config": {"attention": "flash"}},
            ("kv_policy_config.attention", "'bmc' or 'stock'", "'flash'"),
        ),
        (
            {"kv_policy": "bmc", "kv_policy_config": {"pack_linears": 1}},
            ("kv_policy_config.pack_linears", "valid boolean"),
        ),
        ({"kv_policy": "bmc", "kv_policy_config": 3}, ("kv_policy_config\n", "input_value=3")),
        ({"kv_policy_config": {"r": 128}}, ("kv_policy_config is given without kv_policy",)),
        (
            {"kv_policy": "bmc", "replace_with_kernel_inject": True},
            ("replace_with_kernel_inject=True and kv_policy='bmc'",),
        ),
        (
            {"kv_policy": "bmc", "enable_cuda_graph": True},
            ("enable_cuda_graph=True and kv_policy='bmc'",),
        ),
    ],
)
def test_refused_before_the_model_is_touched(
    settings: dict[str, Any], names: tuple[str, ...]
) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValidationError) as refusal:
        init_inference(model, dtype=torch.bfloat16, **settings)
    assert "DeepSpeedInferenceConfig" in str(refusal.value)
    for name in names:
        assert name in str(refusal.value)
    assert model.weight.dtype is torch.float32


def test_assignment_is_checked_too() -> None:
    config = deepspeed.DeepSpeedInferenceConfig(kv_policy="bmc")
    with pytest.raises(ValidationError, match="should be 'bmc'"):
        config.kv_policy = "bcm"


@pytest.mark.parametrize("settings", [{}, {"dtype": "bf16", "max_tokens": 8, "tp": {"tp_size": 2}}])
def test_config_without_kv_policy_is_deepspeeds(settings: dict[str, Any]) -> None:
    ours, stock = deepspeed.DeepSpeedInferenceConfig(**settings), StockConfig(**settings)
    assert isinstance(ours, StockConfig)
    assert type(ours) is not type(stock)
    assert ours.model_dump() == stock.model_dump()
    assert repr(ours) == repr(stock)
    assert str(ours) == str(stock)


def test_config_with_kv_policy_shows_it() -> None:
    config = deepspeed.DeepSpeedInferenceConfig(kv_policy="bmc", kv_policy_config={"r": 64})
    assert "kv_policy='bmc'" in repr(config)
    dumped = config.model_dump()
    assert dumped["kv_policy"] == "bmc"
    assert dumped["kv_policy_config"]["r"] == 64


def test_deepspeeds_auto_stays_deepspeeds() -> None:
    """DeepSpeed takes "auto" for "your default" in every field of its own."""
    config = deepspeed.DeepSpeedInferenceConfig(max_out_tokens="auto", kv_policy="bmc")
    assert config.max_out_tokens == StockConfig().max_out_tokens
