"""The engine with kv_policy="bmc": DeepSpeed's greedy tokens, on every path to the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed import init_inference
from deepspeed.module_inject import LinearAllreduce, LinearLayer
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import bmc_transformers
from bmc_deepspeed import BMCInjectionPolicy, BMCPolicyConfig
from tests.support import tiny_decoders

pytestmark = pytest.mark.engine

BMC: dict[str, Any] = {"kv_policy": "bmc", "kv_policy_config": {"r": 16}}
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
REQUESTS = {
    "plain": {"input_ids": tiny_decoders.prompts(2, 20)},
    "left-padded": tiny_decoders.left_padded((20, 7, 13)),
    "prompt lookup": {
        "input_ids": tiny_decoders.prompts(1, 8).repeat(1, 3),
        "prompt_lookup_num_tokens": 3,
    },
}


def engine_of(name: str, seed: int = 0, **settings: Any) -> Any:
    return init_inference(tiny_decoders.make(name, seed), dtype=torch.float32, **settings)


def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return engine(*args, **kwargs)


@pytest.mark.parametrize("name", tiny_decoders.CONFIGS)
def test_greedy_tokens(name: str) -> None:
    stock, bmc = engine_of(name), engine_of(name, **BMC)
    for key, request in REQUESTS.items():
        expected = stock.generate(**request, **GREEDY)
        if key == "plain":
            assert len(set(expected[:, 20:].flatten().tolist())) > 8, (
                "the tokens would agree by chance"
            )
        assert torch.equal(bmc.generate(**request, **GREEDY), expected), key
    expected = stock.generate(
        **REQUESTS["prompt lookup"] | {"prompt_lookup_num_tokens": None},
        assistant_model=engine_of(name, seed=1).module,
        **GREEDY,
    )
    for settings in (BMC, {}):
        assistant = engine_of(name, seed=1, **settings).module
        found = bmc.generate(
            REQUESTS["prompt lookup"]["input_ids"], assistant_model=assistant, **GREEDY
        )
        assert torch.equal(found, expected), f"assistant with {settings}"


def test_module_as_the_assistant_of_a_model_without_deepspeed() -> None:
    model = tiny_decoders.make("llama-gqa")
    ids = tiny_decoders.prompts(1, 20)
    expected = model.generate(ids, **GREEDY)
    assistant = engine_of("llama-gqa", seed=1, **BMC).module
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)
    assert not bmc_transformers.is_enabled(model)


@pytest.mark.parametrize("settings", [{}, BMC])
def test_engine_itself_is_no_assistant(settings: dict[str, Any]) -> None:
    """A limit of DeepSpeed's: its engine is no transformers model. engine.module is."""
    model = tiny_decoders.make("llama-gqa")
    assistant = engine_of("llama-gqa", seed=1, **settings)
    with pytest.raises(AttributeError, match="InferenceEngine"):
        model.generate(tiny_decoders.prompts(1, 20), assistant_model=assistant, **GREEDY)


def test_an_engine_as_assistant_is_refused_by_name() -> None:
    engine = engine_of("llama-gqa", **BMC)
    with pytest.raises(TypeError, match="assistant_model is a InferenceEngine; allowed: .*module"):
        engine.generate(tiny_decoders.prompts(1, 20), assistant_model=engine, **GREEDY)


@pytest.mark.parametrize("speculate", ["auto", "fixed"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_speculation_gives_the_same_tokens(name: str, speculate: str) -> None:
    request = REQUESTS["prompt lookup"]
    stock = engine_of(name).generate(input_ids=request["input_ids"], **GREEDY)
    engine = engine_of(name, kv_policy="bmc", kv_policy_config={"r": 16, "speculate": speculate})
    assert torch.equal(engine.generate(**request, **GREEDY), stock)
    stats = bmc_transformers.speculation_stats(engine.module)
    before = stats.rounds
    assert stats.draft_tokens > 0
    assistant = engine_of(name, **BMC).module
    assistant.generation_config.assistant_confidence_threshold = 0.0
    found = engine.generate(request["input_ids"], assistant_model=assistant, **GREEDY)
    assert torch.equal(found, stock)
    assert stats.rounds > before


def test_split_models_do_not_choose_lengths_by_the_clock() -> None:
    settings = BMCPolicyConfig(r=16, speculate="auto")
    model = tiny_decoders.make("llama-gqa")
    model.lm_head.tp_world_size = 2  # as DeepSpeed's split layers have it
    with pytest.raises(ValueError, match='speculate="auto" with a model .* over 2 processes'):
        BMCInjectionPolicy(settings).apply(model)
    BMCInjectionPolicy(BMCPolicyConfig(r=16, speculate="fixed")).apply(model)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gptj"])
def test_forward_grows_its_cache_and_goes_on_from_it(name: str) -> None:
    stock, bmc = engine_of(name), engine_of(name, **BMC)
    ids = tiny_decoders.prompts(2, 12)
    expected, found = step(stock, ids, use_cache=True), step(bmc, ids, use_cache=True)
    assert type(expected.past_key_values) is DynamicCache
    assert type(found.past_key_values) is bmc_transformers.BMCCache
    for _ in range(12):
        token = expected.logits[:, -1:].argmax(-1)
        assert torch.equal(found.logits[:, -1:].argmax(-1), token)
        cache = found.past_key_values
        expected = step(stock, token, past_key_values=expected.past_key_values)
        found = step(bmc, token, past_key_values=cache)
        assert found.past_key_values is cache
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)


def test_forward_makes_a_cache_where_the_model_would() -> None:
    engine = engine_of("llama-gqa", **BMC)
    ids = tiny_decoders.prompts(1, 4)
    own = DynamicCache(config=engine.module.config)
    mask = torch.ones_like(ids)
    assert type(step(engine, ids).past_key_values) is bmc_transformers.BMCCache
    assert type(step(engine, input_ids=ids).past_key_values) is bmc_transformers.BMCCache
    assert step(engine, ids, use_cache=False).past_key_values is None
    assert step(engine, ids, past_key_values=own).past_key_values is own
    # input_ids, attention_mask, position_ids, past_key_values
    own = DynamicCache(config=engine.module.config)
    assert step(engine, ids, mask, None, own).past_key_values is own
    engine.module.config.use_cache = False
    assert step(engine, ids).past_key_values is None
    assert type(step(engine, ids, use_cache=True).past_key_values) is bmc_transformers.BMCCache
    bmc_transformers.disable(engine.module)
    assert type(step(engine, ids, use_cache=True).past_key_values) is DynamicCache


def test_deepspeeds_limits_stay() -> None:
    engine = engine_of("llama-gqa", max_out_tokens=8, **BMC)
    with pytest.raises(NotImplementedError, match="num_beams"):
        engine.generate(tiny_decoders.prompts(1, 4), num_beams=2)
    with pytest.raises(RuntimeError, match="exceeds maximum length of 8"):
        engine.generate(input_ids=tiny_decoders.prompts(1, 9), **GREEDY)
    assert engine.generate(input_ids=tiny_decoders.prompts(1, 8), **GREEDY).shape == (1, 32)


def test_composes_with_a_users_injection_policy() -> None:
    split = {LlamaDecoderLayer: ("self_attn.o_proj", "mlp.down_proj")}
    stock = engine_of("llama-gqa", injection_policy=dict(split))
    bmc = engine_of(
        "llama-gqa",
        injection_policy=dict(split),
        kv_policy="bmc",
        kv_policy_config={"r": 16, "pack_linears": True},
    )
    layer = bmc.module.model.layers[0]
    assert type(layer.self_attn.q_proj) is LinearLayer
    assert type(layer.self_attn.o_proj) is LinearAllreduce
    for key, request in REQUESTS.items():
        expected = stock.generate(**request, **GREEDY)
        assert torch.equal(bmc.generate(**request, **GREEDY), expected), key


def test_packed_linears() -> None:
    """In float32 packed weights give the tokens of the plain ones; disable gives those back."""
    stock = engine_of("llama-gqa")
    bmc = engine_of("llama-gqa", kv_policy="bmc", kv_policy_config={"pack_linears": True, "r": 16})
    expected = stock.generate(**REQUESTS["plain"], **GREEDY)
    assert torch.equal(bmc.generate(**REQUESTS["plain"], **GREEDY), expected)
    names, values = zip(*bmc.module.state_dict().items(), strict=True)
    assert list(names) == list(stock.module.state_dict())
    for value, stock_value in zip(values, stock.module.state_dict().values(), strict=True):
        assert torch.equal(value, stock_value)


def test_packed_weights_are_plain_again_when_deepspeed_splits_the_model() -> None:
    split = {LlamaDecoderLayer: ("self_attn.o_proj", "mlp.down_proj")}
    packed = {"kv_policy": "bmc", "kv_policy_config": {"pack_linears": True, "r": 16}}
    expected = engine_of("llama-gqa").generate(**REQUESTS["plain"], **GREEDY)
    model = engine_of("llama-gqa", **packed).module
    assert model.model.layers[0].self_attn.q_proj.weight.is_mkldnn
    engine = init_inference(model, dtype=torch.float32, injection_policy=split, **packed)
    assert not model.model.layers[0].self_attn.q_proj.weight.is_mkldnn
    assert torch.equal(engine.generate(**REQUESTS["plain"], **GREEDY), expected)


@pytest.mark.parametrize("settings", [{"T": 3}, {"r": 1}, {"r": "auto"}, {}])
def test_forward_by_every_kind_of_policy(settings: dict[str, Any]) -> None:
    stock = engine_of("llama-gqa")
    bmc = engine_of("llama-gqa", kv_policy="bmc", kv_policy_config=settings)
    ids = tiny_decoders.prompts(2, 12)
    expected, found = step(stock, ids), step(bmc, ids)
    for _ in range(6):
        token = expected.logits[:, -1:].argmax(-1)
        assert torch.equal(found.logits[:, -1:].argmax(-1), token)
        expected = step(stock, token, past_key_values=expected.past_key_values)
        found = step(bmc, token, past_key_values=found.past_key_values)


@pytest.mark.parametrize("pack", [False, True])
def test_compiled_engine(pack: bool) -> None:
    """torch.compile goes around the cache, the kernel and packed weights."""
    expected = engine_of("llama-gqa").generate(**REQUESTS["plain"], **GREEDY)
    bmc = engine_of("llama-gqa", kv_policy="bmc", kv_policy_config={"r": 16, "pack_linears": pack})
    bmc.compile(backend="eager")
    assert torch.equal(bmc.generate(**REQUESTS["plain"], **GREEDY), expected)


def test_attention_setting() -> None:
    stock_attention = engine_of(
        "llama-gqa", kv_policy="bmc", kv_policy_config={"attention": "stock", "r": 16}
    )
    assert stock_attention.module.config._attn_implementation == "sdpa"
    assert engine_of("llama-gqa", **BMC).module.config._attn_implementation == "bmc"
    with pytest.raises(ValueError, match=r"kv_policy='bmc': attention=\"bmc\".*GPTJForCausalLM"):
        engine_of("gptj", kv_policy="bmc", kv_policy_config={"attention": "bmc"})


def test_models_that_have_no_kv_cache_are_refused_untouched() -> None:
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="kv_policy='bmc' with a model of class Linear: allowed"):
        init_inference(plain, dtype=torch.bfloat16, **BMC)
    assert plain.weight.dtype is torch.float32
    config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=32)
    with pytest.raises(ValueError, match="class T5ForConditionalGeneration: allowed"):
        init_inference(T5ForConditionalGeneration(config), dtype=torch.float32, **BMC)


def test_a_second_engine_over_the_same_model_changes_the_settings() -> None:
    model = tiny_decoders.make("llama-gqa")
    expected = init_inference(model, dtype=torch.float32).generate(**REQUESTS["plain"], **GREEDY)
    for rows in (16, 64):
        engine = init_inference(
            model, dtype=torch.float32, kv_policy="bmc", kv_policy_config={"r": rows}
        )
        out = engine.generate(**REQUESTS["plain"], **GREEDY, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        assert out.past_key_values.policy.r == rows
