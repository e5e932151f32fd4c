"""The "bmc" attention function: the kernel where it can, the right result everywhere else."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from bmc_transformers import BMCCache, enable, register_attention
from bmc_transformers.attention import bmc_attention
from bmc_transformers.lazy import CausalMask
from tests.support.architectures import (
    CONFIGS,
    WITHOUT_INTERFACE,
    build,
    generated,
    padding,
    prompt,
)
from tests.support.logits import TOLERANCE, assert_close, logits

INTERFACE = [name for name in CONFIGS if name not in WITHOUT_INTERFACE]
FALLBACK = "bmc attention: plain torch attention is used, because "


def stepwise(model, cache, mask=None) -> torch.Tensor:
    """Logits of a prompt, then of 3 tokens at once, then of single ones."""
    ids = torch.cat((prompt(), prompt() + 1), dim=1)[:, :30]
    steps = [range(0, 21), range(21, 24), *(range(n, n + 1) for n in range(24, 30))]
    parts = []
    for step in steps:
        columns = None
        if mask is not None:
            columns = torch.ones(2, step.stop, dtype=torch.int64)
            columns[:, : mask.shape[1]] = mask
        chunk = ids[:, step.start : step.stop]
        parts.append(logits(model, chunk, cache, attention_mask=columns))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", INTERFACE)
def test_logits_are_close_in_every_dtype(name: str, dtype: torch.dtype, caplog) -> None:
    model = build(name, dtype)
    expected = stepwise(model, DynamicCache(config=model.config), padding())
    enable(model, 16)
    cache = BMCCache(model.config, 16)
    actual = stepwise(model, cache, padding())
    assert cache.stats().layouts == {"packed": 2}
    assert_close(actual[:, 6:], expected[:, 6:])  # what precedes is padding
    assert FALLBACK not in caplog.text


MASKS = {
    "right padding": lambda: torch.arange(21) < torch.tensor([[15], [21]]),
    "hole": lambda: (torch.arange(21) != 9).expand(2, 21),
    "4-D bool": lambda: (
        torch.ones(21, 21).tril(-0).bool().expand(2, 1, 21, 21) & (torch.arange(21) != 4)
    ),
    "4-D float": lambda: (
        torch.zeros(21, 21)
        .masked_fill(torch.ones(21, 21).triu(1).bool(), torch.finfo(torch.float32).min)
        .expand(2, 1, 21, 21)
    ),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_other_masks_fall_back_with_one_line(name: str, kind: str, caplog) -> None:
    model = build(name)
    mask = MASKS[kind]()
    if mask.dim() == 4 and name == "gemma2":
        mask = mask if mask.dtype != torch.bool else torch.where(mask, 0.0, -1e30)
    expected = logits(model, prompt(), DynamicCache(config=model.config), attention_mask=mask)
    if mask.dim() == 4 and name == "gemma2" and kind == "4-D bool":
        mask = MASKS[kind]()
    enable(model, 16)
    actual = logits(model, prompt(), BMCCache(model.config, 16), attention_mask=mask)
    seen = mask.bool() if mask.dim() == 2 else torch.ones(2, 21, dtype=torch.bool)
    assert_close(actual[seen], expected[seen])
    lines = [record.message for record in caplog.records if FALLBACK in record.message]
    assert lines == [FALLBACK + "the mask is more than causal with a window or left padding"]


@pytest.mark.parametrize("name", INTERFACE)
def test_without_a_bmc_cache_the_attention_is_right_too(name: str) -> None:
    model = build(name)
    expected = stepwise(model, DynamicCache(config=model.config), padding())
    whole = logits(model, prompt(), use_cache=False, attention_mask=padding())
    enable(model, 16)
    actual = stepwise(model, DynamicCache(config=model.config), padding())
    assert_close(actual[:, 6:], expected[:, 6:])
    actual = logits(model, prompt(), use_cache=False, attention_mask=padding())
    assert_close(actual[:, 6:], whole[:, 6:])


def test_a_row_that_sees_nothing_gives_no_nan(caplog) -> None:
    model = enable(build("llama"), 16)
    mask = torch.ones(2, 21, dtype=torch.int64)
    mask[0] = 0
    assert (
        not logits(model, prompt(), BMCCache(model.config, 16), attention_mask=mask).isnan().any()
    )
    assert FALLBACK not in caplog.text
    model = enable(build("gemma2"), 16)
    assert not logits(model, prompt(), use_cache=False, attention_mask=mask).isnan().any()


def test_the_soft_cap_counts() -> None:
    model = build("gemma2")
    capped = logits(model, prompt())
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (logits(model, prompt()) - capped).abs().max() > 0.01


def one_layer():
    register_attention()
    config = CONFIGS["llama"]()
    config._attn_implementation = "bmc"
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    return BMCCache(config, 16), module


def reference(query, key, value, mask=None, **kwargs) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key + 0, value + 0, attn_mask=mask, enable_gqa=True, **kwargs
    )
    return out.transpose(1, 2)


def test_dropout_falls_back(caplog) -> None:
    query = torch.randn(1, 4, 1, 32)
    cache, module = one_layer()
    key, value = cache.update(*torch.randn(2, 1, 2, 5, 32), 0)
    bmc_attention(module, query, key, value, None, dropout=0.5)
    assert FALLBACK + "dropout is 0.5" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q, k * 2, v), None),  # plain: nothing to say
        (lambda q, k, v: (q, k.mul_(2), v), "the model changed K or V"),
        (lambda q, k, v: (q, v, k), "the model changed K or V"),
        (lambda q, k, v: (q, k, v * 2), "the model changed K or V"),
        (lambda q, k, v: (q, k, v[:, :, :]), "the model changed K or V"),
    ],
)
def test_a_model_may_change_k_and_v(change, reason, caplog) -> None:
    cache, module = one_layer()
    query, key, value = torch.randn(1, 4, 1, 32), *cache.update(*torch.randn(2, 1, 2, 5, 32), 0)
    query, key, value = change(query, key, value)
    out, weights = bmc_attention(module, query, key, value, None)
    assert weights is None
    torch.testing.assert_close(out, reference(query, key, value), rtol=0, atol=1e-5)
    assert (reason in caplog.text) if reason else (FALLBACK not in caplog.text)


def test_writing_into_k_is_noticed() -> None:
    cache, module = one_layer()
    query, key, value = torch.randn(1, 4, 1, 32), *cache.update(*torch.randn(2, 1, 2, 5, 32), 0)
    key.mul_(0.0)
    out, _ = bmc_attention(module, query, key, value, None)
    torch.testing.assert_close(out, reference(query, key * 0, value), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"is_causal": False}, "attention is not causal"),
        ({"position_bias": torch.zeros(1, 4, 3, 5)}, "the model passes position_bias"),
        ({"attention_mask": torch.zeros(1, 1, 3, 5)}, "the mask is more than causal"),
    ],
)
def test_what_the_kernel_lacks_falls_back(arguments, reason, caplog) -> None:
    cache, module = one_layer()
    query, key, value = torch.randn(1, 4, 3, 32), *cache.update(*torch.randn(2, 1, 2, 5, 32), 0)
    arguments = {"attention_mask": None} | arguments
    out, _ = bmc_attention(module, query, key, value, **arguments)
    causal = torch.ones(3, 5).tril(2).bool() if "position_bias" in arguments else None
    torch.testing.assert_close(out, reference(query, key, value, causal), rtol=0, atol=1e-5)
    assert FALLBACK + reason in caplog.text


@pytest.mark.parametrize("what", ["mask", "batch"])
def test_one_line_however_many_steps_fall_back(what: str, caplog) -> None:
    """What changes from step to step is not in the line, or there would be one for each."""
    cache, module = one_layer()
    for step in range(3):
        key, value = cache.update(*torch.randn(2, 1, 2, 5, 32), 0)
        shape = (1, 1, 1, 4 + step)
        mask = CausalMask.of(
            shape,
            first_rows=None,
            window=None,
            maker=lambda rows=key.shape[2]: torch.ones(1, 1, 1, rows, dtype=torch.bool),
        )
        query = torch.randn(1 if what == "mask" else 2 + step, 4, 1, 32)
        if what == "batch":
            mask = None
        bmc_attention(module, query, key, value, mask)
    lines = [record.message for record in caplog.records if FALLBACK in record.message]
    reason = {
        "mask": "the mask is of other rows than query and key",
        "batch": "the query is of another batch than the cache",
    }[what]
    assert lines == [FALLBACK + reason]


def test_without_a_mask_queries_are_the_last_rows() -> None:
    cache, module = one_layer()
    query, key, value = torch.randn(1, 4, 3, 32), *cache.update(*torch.randn(2, 1, 2, 5, 32), 0)
    expected = reference(query, key, value, torch.ones(3, 5).tril(2).bool())
    for dropout in (0.0, 1e-12):  # the second falls back
        out, _ = bmc_attention(module, query, key, value, None, dropout=dropout)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss"])
def test_a_static_cache_goes_with_the_attention(name: str) -> None:
    """It hands out all its rows; the first step's mask is None."""
    model = build(name)
    arguments = {"inputs": prompt(), "cache_implementation": "static"}
    stock = generated(model, arguments)
    output = generated(enable(model, 16), arguments)
    assert type(output.past_key_values) is StaticCache
    assert torch.equal(output.sequences, stock.sequences)


def test_inference_mode_and_outside() -> None:
    model = build("mistral")
    expected = stepwise(model, DynamicCache(config=model.config))
    enable(model, 16)
    cache = BMCCache(model.config, 16)
    ids = torch.cat((prompt(), prompt() + 1), dim=1)[:, :30]
    with torch.inference_mode():
        parts = [model(ids[:, :21], past_key_values=cache).logits]
    with torch.no_grad():
        parts.append(model(ids[:, 21:24], past_key_values=cache).logits)
    with torch.inference_mode():
        parts.append(model(ids[:, 24:], past_key_values=cache).logits)
    assert_close(torch.cat(parts, dim=1).clone(), expected)
