"""A layer of the backend without an engine: what vLLM may hand it, step after step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bmc_core.attention import paged_attention, write_kv
from bmc_vllm.attention import FP8_KV_CACHE, BMCAttentionImpl, BMCAttentionMetadata
from tests.support.reference import Case, Inputs

PADDING = 5


def impl_of(inputs: Inputs, **changes: Any) -> BMCAttentionImpl:
    case = inputs.case
    return BMCAttentionImpl(
        **{
            "num_heads": case.query_heads,
            "head_size": case.head_size,
            "scale": inputs.scale,
            "num_kv_heads": case.kv_heads,
            **changes,
        }
    )


def layer_with(key_scale: float = 1.0, value_scale: float = 1.0) -> Any:
    return SimpleNamespace(_k_scale_float=key_scale, _v_scale_float=value_scale)


def padded(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.full_like(rows[:1], float("nan")).repeat(PADDING, 1, 1)])


def attended(impl: BMCAttentionImpl, inputs: Inputs, layer: Any) -> torch.Tensor:
    """The rows that are no padding; no other is written."""
    query, tokens = padded(inputs.query), len(inputs.query)
    out = torch.full_like(query, 7.0)
    metadata = BMCAttentionMetadata(inputs.batch(), tokens)
    cache = inputs.kv_cache
    if cache.itemsize == 1:
        cache = cache.view(torch.uint8)
    for _ in range(2):  # checked in full, and bound
        assert impl.forward(layer, query, query, query, cache, metadata, out) is out
        assert (out[tokens:] == 7.0).all()
    return out[:tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_neither_read_nor_written(dtype: torch.dtype) -> None:
    inputs = Inputs(Case([40, 20], [1, 2], dtype=dtype, poison=0.0))
    impl, layer = impl_of(inputs), layer_with()
    rows = torch.ones(2, 2, 64, dtype=dtype)
    slots = torch.tensor([35, -1])
    written = inputs.kv_cache.clone()
    write_kv(rows, 2 * rows, written, slots)
    before = inputs.kv_cache.clone()
    for _ in range(3):
        inputs.kv_cache.copy_(before)
        impl.do_kv_cache_update(layer, padded(rows), padded(2 * rows), inputs.kv_cache, slots)
        assert torch.equal(inputs.kv_cache, written)
    assert torch.equal(attended(impl, inputs, layer), inputs.run())


@pytest.mark.parametrize("name", FP8_KV_CACHE)
def test_scales_that_change_are_used(name: str) -> None:
    """The first steps may come before the checkpoint's scales, or weights are loaded again."""
    inputs = Inputs(Case([40, 20], [1, 2], cache_dtype=FP8_KV_CACHE[name], poison=0.0))
    impl, layer = impl_of(inputs, kv_cache_dtype=name), layer_with()
    rows = torch.rand(2, 2, 64)
    slots = torch.tensor([35, 36])
    for key_scale, value_scale in ((1.0, 1.0), (0.25, 1.0), (0.25, 3.0)):
        layer._k_scale_float, layer._v_scale_float = key_scale, value_scale
        scales = {"key_scale": key_scale, "value_scale": value_scale}
        written = inputs.kv_cache.clone()
        write_kv(rows, rows, written, slots, **scales)
        cache = inputs.kv_cache.view(torch.uint8)
        for _ in range(2):
            impl.do_kv_cache_update(layer, rows, rows, cache, slots)
        assert torch.equal(cache, written.view(torch.uint8))
        expected = torch.empty_like(inputs.query)
        paged_attention(
            inputs.query, written, inputs.batch(), expected, scale=inputs.scale, **scales
        )
        assert torch.equal(attended(impl, inputs, layer), expected)


def test_sinks_that_are_loaded_again_are_used() -> None:
    inputs = Inputs(Case([40, 20], [1, 2], poison=0.0))
    parameter = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    impl = impl_of(inputs, sinks=parameter)
    for value in (0.0, 2.0):
        parameter.data.fill_(value)
        impl.process_weights_after_loading(torch.float32)
        inputs.sinks = torch.full((4,), value)
        assert torch.equal(attended(impl, inputs, layer_with()), inputs.run())


def test_a_query_that_does_not_fit_is_refused() -> None:
    inputs = Inputs(Case([40, 20], [1, 2], poison=0.0))
    impl, layer = impl_of(inputs), layer_with()
    attended(impl, inputs, layer)
    metadata = BMCAttentionMetadata(inputs.batch(), 3)
    out = torch.empty_like(inputs.query)
    arguments = (inputs.query, inputs.query, inputs.kv_cache, metadata, out)
    impl.forward(layer, inputs.query, *arguments)
    for wrong, error in ((inputs.query.double(), TypeError), (inputs.query[..., :32], ValueError)):
        with pytest.raises(error, match=r"^query"):
            impl.forward(layer, wrong, *arguments)
