"""A model's K and V, read from the configs of many families."""

from types import SimpleNamespace

import pytest
import torch

from bmc_core.costs.geometry import Geometry

LLAMA = {
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "dtype": "bfloat16",
}


def test_bytes_of_a_row() -> None:
    geometry = Geometry(8, 32, 4, 64, torch.bfloat16)
    assert geometry.layer_row_bytes == 2 * 4 * 64 * 2
    assert geometry.row_bytes == 8 * 2 * 4 * 64 * 2
    assert geometry.hidden_size == 2048
    assert geometry.intermediate_size == 8192


@pytest.mark.parametrize("make", [dict, lambda fields: SimpleNamespace(**fields)])
def test_llama(make) -> None:
    geometry = Geometry.from_config(make(LLAMA))
    assert geometry == Geometry(8, 32, 4, 64, torch.bfloat16, 2048, 5632)
    assert Geometry.from_config(make({**LLAMA, "head_dim": 128})).head_size == 128


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, (12, 12, 12, 64)),
        ({"n_layers": 2, "n_heads": 4, "d_model": 64}, (2, 4, 4, 16)),
        ({"num_layers": 3, "num_heads": 2, "hidden_size": 8}, (3, 2, 2, 4)),
        (
            {"n_layer": 2, "n_head": 8, "hidden_size": 64, "multi_query": True},
            (2, 8, 1, 8),
        ),
        (
            {
                **{"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64},
                **{"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2},
            },
            (2, 8, 2, 8),
        ),
        ({"text_config": {**LLAMA}, "vision_config": {}}, (8, 32, 4, 64)),
    ],
)
def test_names_of_other_families(fields: dict, expected: tuple[int, ...]) -> None:
    geometry = Geometry.from_config(fields)
    found = (geometry.num_layers, geometry.num_query_heads, geometry.num_kv_heads)
    assert (*found, geometry.head_size) == expected


def test_real_configs_of_transformers() -> None:
    from transformers import GPT2Config, LlamaConfig, OPTConfig

    config = LlamaConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2
    )
    assert Geometry.from_config(config, torch.float16).row_bytes == 3 * 2 * 2 * 16 * 2
    assert Geometry.from_config(GPT2Config()).head_size == 64
    assert Geometry.from_config(OPTConfig().to_dict()).num_kv_heads == 12


def test_dtype() -> None:
    assert Geometry.from_config(LLAMA, torch.float16).dtype is torch.float16
    assert Geometry.from_config(LLAMA, "float16").dtype is torch.float16
    assert Geometry.from_config({**LLAMA, "dtype": "torch.float32"}).dtype is torch.float32
    assert Geometry.from_config({**LLAMA, "dtype": None, "torch_dtype": "float16"}).dtype is (
        torch.float16
    )
    assert Geometry.from_config({**LLAMA, "dtype": None}).dtype is torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "number of layers is missing.*num_hidden_layers or n_layer"),
        ({"num_attention_heads": None}, "attention heads is missing.*num_attention_heads"),
        ({"hidden_size": None}, "head size is missing.*head_dim or hidden_size"),
        ({"hidden_size": 100}, "hidden_size=100 is no multiple of 32"),
        ({"num_hidden_layers": "8"}, "number of layers is '8'"),
        ({"num_key_value_heads": 5}, "num_query_heads=32: expected a multiple of num_kv_heads=5"),
        ({"head_dim": 0}, "head_size=0"),
        ({"dtype": "int99"}, "dtype='int99': expected the name of a torch dtype"),
    ],
)
def test_a_bad_config_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry.from_config({**LLAMA, **change})


def test_bad_values_are_named() -> None:
    with pytest.raises(TypeError, match=r"head_size=64\.0"):
        Geometry(1, 1, 1, 64.0, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype='bfloat16'"):
        Geometry(1, 1, 1, 64, "bfloat16")  # type: ignore[arg-type]
