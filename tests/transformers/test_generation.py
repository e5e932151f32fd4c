"""`enable` and `disable`: what they change, and that nothing else changes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from bmc_core.policy import BMCPolicy
from bmc_transformers import BMCCache, disable, enable, is_enabled
from bmc_transformers.linears import PackedLinear
from tests.support.architectures import SCENARIOS, build, draft, expected, generated, prompt

IMPORT_CHANGES_NOTHING = """
import transformers, torch
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, cache_utils
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def picture():
    return (
        sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        sorted(AttentionMaskInterface._global_mapping),
        dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING),
        dict(cache_utils.STATIC_LAYER_TYPE_MAPPING),
        dict(vars(GenerationMixin)),
        dict(vars(PreTrainedModel)),
        dict(vars(torch.nn.Linear)),
        dict(vars(torch.Tensor)),
    )

before = picture()
import bmc_transformers
assert picture() == before
"""


@pytest.mark.engine
def test_importing_changes_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHANGES_NOTHING], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def picture(model) -> tuple:
    """All of a model that `enable` might touch."""
    return (
        dict(vars(model)),
        copy.deepcopy(vars(model.config)),
        {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()},
        {name: id(parameter) for name, parameter in model.named_parameters()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )


@pytest.mark.parametrize("pack_linears", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
def test_disable_restores_everything(name: str, pack_linears: bool) -> None:
    model = build(name)
    before = picture(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    enable(model, 16, pack_linears=pack_linears)
    assert is_enabled(model)
    generated(model, {"inputs": prompt()}, 3)
    assert disable(model) is model
    assert not is_enabled(model)
    assert picture(model) == before
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    output = generated(model, {"inputs": prompt()})
    assert type(output.past_key_values) is DynamicCache
    assert torch.equal(output.sequences, expected(name, "plain"))
    assert disable(model) is model
    assert picture(model) == before


def test_enabling_again_changes_the_settings() -> None:
    model = build("llama")
    before = picture(model)
    enable(model, 16, pack_linears=True)
    cache = generated(model, {"inputs": prompt()}, 3).past_key_values
    assert (cache.policy, cache.stats().layouts) == (BMCPolicy(r=16), {"packed": 2})
    assert any(type(module) is PackedLinear for module in model.modules())
    enable(model, BMCPolicy(T=2), attention="stock")
    cache = generated(model, {"inputs": prompt()}, 3).past_key_values
    assert (cache.policy, cache.stats().layouts) == (BMCPolicy(T=2), {"rows": 2})
    assert model.config._attn_implementation == "sdpa"
    assert not any(type(module) is PackedLinear for module in model.modules())
    enable(model, 32, attention="bmc")
    assert model.config._attn_implementation == "bmc"
    assert picture(disable(model)) == before


@pytest.mark.parametrize("attention", ["bmc", "stock"])
@pytest.mark.parametrize("packed", [False, True])
def test_enabling_again_that_fails_leaves_the_settings_of_before(
    attention: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other attention is set already and some layers are packed or unpacked."""
    model = enable(build("llama"), 16, attention=attention, pack_linears=packed)
    before, plain = picture(model), picture(build("llama"))
    name = "unpack" if packed else "pack"
    real, done = getattr(PackedLinear, name), []

    def failing(self: PackedLinear) -> None:
        done.append(self)
        if len(done) == 3:
            raise RuntimeError("can't allocate memory")
        real(self)

    monkeypatch.setattr(PackedLinear, name, failing)
    other = {"bmc": "stock", "stock": "bmc"}[attention]
    with pytest.raises(RuntimeError, match="can't allocate"):
        enable(model, 32, attention=other, pack_linears=not packed)
    monkeypatch.undo()
    after = picture(model)
    assert after[:3] == before[:3]
    assert after[4] == before[4]
    cache = generated(model, {"inputs": prompt()}, 3).past_key_values
    layout = {"bmc": "packed", "stock": "rows"}[attention]
    assert (cache.policy, cache.stats().layouts) == (BMCPolicy(r=16), {layout: 2})
    assert picture(disable(model))[2] == plain[2]


@pytest.mark.parametrize("attention", ["bmc", "stock"])
def test_autocast_gives_the_tokens_of_stock(attention: str, caplog) -> None:
    """Rotated keys are float32 and values bfloat16: plain rows, each in its own dtype."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        stock = generated(model, {"inputs": prompt()})
        enable(model, 16, attention=attention)
        output = generated(model, {"inputs": prompt()})
    cache = output.past_key_values
    assert (cache.layers[0].keys.dtype, cache.layers[0].values.dtype) == (
        torch.float32,
        torch.bfloat16,
    )
    assert cache.stats().layouts == {"rows": 2}
    assert torch.equal(output.sequences, stock.sequences)
    assert ("K is torch.float32 and V is torch.bfloat16" in caplog.text) == (attention == "bmc")


def test_the_cache_is_as_long_as_generation_needs() -> None:
    model = enable(build("llama"), BMCPolicy.up_front())
    stats = generated(model, {"inputs": prompt(), "num_beams": 2}, 12).past_key_values.stats()
    assert (stats.growths, stats.rows_reserved) == (2, 2 * 32)  # 21 + 12 - 1 tokens


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"use_cache": False}, type(None)),
        ({"cache_implementation": "static"}, StaticCache),
        ({"cache_implementation": "dynamic"}, DynamicCache),
        ({"past_key_values": DynamicCache()}, DynamicCache),
    ],
)
def test_what_the_user_chose_for_the_cache_stays(arguments, kind) -> None:
    model = enable(build("llama"), 16)
    output = generated(model, {"inputs": prompt(), **arguments})
    assert type(output.past_key_values) is kind
    assert torch.equal(output.sequences, expected("llama", "plain"))


class TestAssistants:
    def caches(self, model, arguments, monkeypatch) -> list[int]:
        """How many caches each call of `generate` made, main model and assistant together."""
        made = []
        original = BMCCache.__init__
        monkeypatch.setattr(
            BMCCache,
            "__init__",
            lambda self, *args, **kwargs: (made.append(self), original(self, *args, **kwargs))[1],
        )
        generated(model, arguments)
        return made

    @pytest.mark.parametrize("policy", [16, BMCPolicy(T=3), BMCPolicy.growing()])
    def test_an_assistant_is_enabled_for_the_call(self, policy, monkeypatch) -> None:
        model = build("llama")
        arguments = SCENARIOS["assisted"](model)
        assistant = arguments["assistant_model"]
        before = picture(assistant)
        caches = self.caches(enable(model, policy), arguments, monkeypatch)
        assert len(caches) == 2
        assert all(cache.stats().layouts == {"packed": 2} for cache in caches)
        assert picture(assistant) == before

    def test_an_enabled_assistant_keeps_its_own_settings(self, monkeypatch) -> None:
        model = build("llama")
        assistant = enable(draft(model), 48, attention="stock")
        caches = self.caches(
            enable(model, 16), {"inputs": prompt(1), "assistant_model": assistant}, monkeypatch
        )
        assert {cache.policy for cache in caches} == {BMCPolicy(r=16), BMCPolicy(r=48)}
        assert is_enabled(assistant)
        assert assistant.config._attn_implementation == "sdpa"

    def test_it_is_disabled_after_an_error_too(self) -> None:
        model = enable(build("llama"), 16)
        assistant = draft(build("llama"))
        with pytest.raises(ValueError, match="batch_size = 1"):
            model.generate(prompt(2), assistant_model=assistant, max_new_tokens=4)
        assert not is_enabled(assistant)

    def test_an_assistant_that_bmc_cannot_serve_keeps_its_cache(self, caplog) -> None:
        model = enable(build("llama"), 16)
        torch.manual_seed(0)
        assistant = MambaForCausalLM(
            MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
        )
        with pytest.raises(Exception):  # noqa: B017, PT011  stock fails as well: no way to roll back
            generated(build("llama"), {"inputs": prompt(1), "assistant_model": assistant})
        with pytest.raises(Exception):  # noqa: B017, PT011
            generated(model, {"inputs": prompt(1), "assistant_model": assistant})
        assert "the assistant keeps its own cache: model MambaForCausalLM" in caplog.text


def test_methods_that_somebody_put_there_before_are_kept() -> None:
    model = build("llama")
    calls = []
    plain = model.generate

    def mine(*args, **kwargs):
        calls.append(kwargs)
        return plain(*args, **kwargs)

    model.generate = mine
    enable(model, 16)
    assert isinstance(generated(model, {"inputs": prompt()}, 2).past_key_values, BMCCache)
    assert len(calls) == 1
    assert disable(model).generate is mine


def test_a_copy_of_the_model_is_enabled_by_itself() -> None:
    model = enable(build("llama"), 16)
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    before = picture(model)
    disable(twin)
    assert picture(model) == before
    assert type(generated(twin, {"inputs": prompt()}, 2).past_key_values) is DynamicCache
    assert type(generated(model, {"inputs": prompt()}, 2).past_key_values) is BMCCache


def test_a_later_choice_of_attention_survives_disable() -> None:
    model = enable(build("llama"), 16)
    model.set_attn_implementation("eager")
    output = generated(model, {"inputs": prompt()})
    assert output.past_key_values.stats().layouts == {"rows": 2}
    assert torch.equal(output.sequences, expected("llama", "plain"))
    assert disable(model).config._attn_implementation == "eager"


def test_models_without_an_attention_interface_are_told_once(caplog) -> None:
    for _ in range(2):
        enable(build("gptj"), 16)
    assert [record.message for record in caplog.records] == [
        "bmc_transformers: cache without the native kernel, because GPTJForCausalLM has no "
        "attention interface"
    ]


def test_only_the_decoder_of_a_model_with_other_parts_changes() -> None:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    model = LlavaForConditionalGeneration(config).eval()
    before = picture(model)
    arguments = {"inputs": prompt() % 90}
    stock = generated(model, arguments, 8)
    enable(model, 16)
    assert model.config.text_config._attn_implementation == "bmc"
    assert model.config.vision_config._attn_implementation == "sdpa"
    output = generated(model, arguments, 8)
    assert output.past_key_values.stats().layouts == {"packed": 1}
    assert torch.equal(output.sequences, stock.sequences)
    assert picture(disable(model)) == before


def qwen3_next():
    return AutoModelForCausalLM.from_config(
        Qwen3NextConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            intermediate_size=16,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        )
    )


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (lambda: build("llama"), {"policy": "fast"}, ValueError, "policy='fast': allowed are"),
        (lambda: build("llama"), {"policy": 0}, ValueError, "policy=0: allowed are"),
        (lambda: build("llama"), {"policy": None}, TypeError, "policy=None: allowed are"),
        (lambda: build("llama"), {"attention": "sdpa"}, ValueError, "attention='sdpa': allowed"),
        (lambda: build("llama"), {"pack_linears": "yes"}, TypeError, "pack_linears='yes'"),
        (lambda: build("llama"), {"pack_linears": 1}, TypeError, "pack_linears=1: allowed are"),
        (lambda: build("gptj"), {"attention": "bmc"}, ValueError, "has no attention interface"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
            ),
            {},
            ValueError,
            "T5ForConditionalGeneration is an encoder-decoder; allowed",
        ),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)),
            {},
            ValueError,
            "MambaForCausalLM has a cache of its own kind",
        ),
        (qwen3_next, {}, ValueError, "layers of type linear_attention"),
        (lambda: build("llama").model, {}, TypeError, "model is a LlamaModel; allowed"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(make, settings, error, message) -> None:
    model = make()
    before = picture(model)
    with pytest.raises(error, match=message):
        enable(model, **{"policy": 16} | settings)
    assert picture(model) == before


@pytest.mark.parametrize("call", [disable, is_enabled])
@pytest.mark.parametrize("wrong", [None, "llama", torch.nn.Linear])
def test_what_is_no_model_is_named(call, wrong) -> None:
    with pytest.raises(TypeError, match=r"model=.* is a .*; allowed: the model that enable"):
        call(wrong)
    linear = torch.nn.Linear(2, 2)
    assert disable(linear) is linear


def test_an_assistant_by_position_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, assistant = build("llama"), build("llama")
    enable(model, 16)
    enabled = []
    original = type(assistant)._prepare_cache_for_generation
    monkeypatch.setattr(
        type(assistant),
        "_prepare_cache_for_generation",
        lambda self, *args: (enabled.append(is_enabled(assistant)), original(self, *args))[1],
    )
    # inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn,
    # synced_gpus, assistant_model
    model.generate(torch.arange(5)[None], None, None, None, None, None, assistant, max_new_tokens=6)
    assert enabled
    assert all(enabled)
    assert not is_enabled(assistant)
