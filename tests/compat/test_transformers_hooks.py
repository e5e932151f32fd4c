"""What `bmc_transformers` leans on in transformers 5.19 to 5.23 and torch beyond their documents.

One test per hook: when it moves, the test that fails says which file of `bmc_transformers` to open.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers import masking_utils as masks
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.generation import GenerationMode
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)
from transformers.masking_utils import (
    AttentionMaskInterface,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import AttentionInterface

from bmc_transformers.generation import _ASSISTANT_POSITION
from bmc_transformers.masks import causal_window


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64, eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPT = torch.arange(8)[None]


def test_prepare_cache_for_generation_is_where_generate_makes_its_cache(model) -> None:
    """generation.py: called once, on the instance; the cache is put into `model_kwargs`."""
    parameters = list(inspect.signature(model._prepare_cache_for_generation).parameters)
    assert parameters == [
        "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length",
    ]  # fmt: skip
    seen: list[Any] = []
    stock = model._prepare_cache_for_generation

    def spy(config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, most: int) -> Any:
        result = stock(config, model_kwargs, mode, batch, most)
        seen.append((type(model_kwargs["past_key_values"]), batch, most))
        return result

    model._prepare_cache_for_generation = spy
    model.generate(PROMPT, max_new_tokens=4, do_sample=False)
    # The last token is never fed back, so its row is not needed.
    assert seen == [(DynamicCache, 1, 8 + 4 - 1)]


def test_generate_takes_the_assistant_by_this_name() -> None:
    """generation.py looks `assistant_model` up, also by position."""
    bound = inspect.signature(GenerationMixin.generate).bind(None, *range(_ASSISTANT_POSITION + 1))
    assert bound.arguments["assistant_model"] == _ASSISTANT_POSITION


def test_candidates_come_from_a_generator_that_is_made_once(model) -> None:
    """speculation/calls.py: asked of the instance, with these arguments by name."""
    seen: list[dict[str, Any]] = []
    stock = model._get_candidate_generator

    def spy(**arguments: Any) -> Any:
        seen.append(arguments)
        return stock(**arguments)

    model._get_candidate_generator = spy
    model.generate(PROMPT, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    assert len(seen) == 1
    assert {
        "generation_config", "input_ids", "assistant_model", "logits_processor", "model_kwargs",
    } <= set(seen[0])  # fmt: skip
    assert seen[0]["generation_config"]._eos_token_tensor is None
    assert seen[0]["generation_config"].max_length == 12


def made_generator(model, **arguments: Any) -> Any:
    made: list[Any] = []
    stock = model._get_candidate_generator
    model._get_candidate_generator = lambda **given: made.append(stock(**given)) or made[0]
    model.generate(PROMPT, max_new_tokens=4, do_sample=False, **arguments)
    return made[0]


def test_candidate_generators_tell_what_they_were_told(model) -> None:
    """speculation/calls.py puts ours in place of exactly these two, and reads these attributes."""
    lookup = made_generator(copy.deepcopy(model), prompt_lookup_num_tokens=3)
    assert type(lookup) is PromptLookupCandidateGenerator
    assert lookup.num_output_tokens == 3
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 7
    drafts = made_generator(copy.deepcopy(model), assistant_model=assistant)
    assert type(drafts) is AssistedCandidateGenerator
    assert (drafts.assistant_model, drafts.num_assistant_tokens) == (assistant, 7)
    assert 0 <= drafts.assistant_confidence_threshold <= 1
    defaults = GenerationConfig._get_default_generation_params()
    assert defaults["num_assistant_tokens"] == 20


class Scripted(CandidateGenerator):
    """Always the same two tokens, without logits; remembers what it is told."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.told: list[tuple[int, int, int]] = []

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 14:
            return input_ids, None
        return torch.cat((input_ids, input_ids.new_tensor([[5, 6]])), dim=1), None

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: Any) -> None:
        self.told.append((input_ids.shape[1], int(num_matches), self.cache.get_seq_length()))


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_generator_of_our_own_is_asked_and_told(model, do_sample: bool) -> None:
    """speculation/steering.py: each round, candidates or none; then the matches, when rejected rows
    are gone. Drafts without logits are verified by tokens that the model itself chooses."""
    made: list[Scripted] = []

    def generator(**given: Any) -> Scripted:
        made.append(Scripted(given["model_kwargs"]["past_key_values"]))
        return made[0]

    model._get_candidate_generator = generator
    arguments = {"max_new_tokens": 12, "do_sample": do_sample}
    torch.manual_seed(0)
    output = model.generate(PROMPT, prompt_lookup_num_tokens=3, **arguments)
    lengths = [length for length, _, _ in made[0].told]
    assert lengths[-1] == output.shape[1] == 20
    before = 8
    for length, matches, rows in made[0].told:
        assert length == before + matches + 1
        assert rows == length - 1
        before = length


def test_the_settings_of_a_call_can_be_asked_before_it(model) -> None:
    """speculation/calls.py: what `generate` will do, from its arguments."""
    given = GenerationConfig(max_new_tokens=5)
    before = given.to_dict()
    config, inputs = model._prepare_generation_config(given, input_ids=PROMPT)
    assert config.get_generation_mode() == GenerationMode.GREEDY_SEARCH
    assert set(inputs) == {"input_ids"}
    assert given.to_dict() == before
    config, _ = model._prepare_generation_config(None, do_sample=True, prompt_lookup_num_tokens=2)
    assert config.get_generation_mode() == GenerationMode.ASSISTED_GENERATION


def test_assistants_reject_tokens_by_crop(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """layers.py: `crop` gets minus the number of rejected rows, 0 included."""
    counts: list[int] = []
    original = Cache.crop

    def spy(self: Cache, tokens: int) -> None:
        counts.append(tokens)
        original(self, tokens)

    monkeypatch.setattr(Cache, "crop", spy)
    model.generate(PROMPT, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert counts
    assert max(counts) <= 0


def test_an_attention_is_chosen_by_name(model) -> None:
    """attention.py: a registered function gets K and V unrepeated, and the mask of its namesake;
    without a mask function of that name the mask is silently None."""
    seen: list[tuple[torch.Size, Any]] = []

    def attention(module, query, key, value, attention_mask, **arguments):
        seen.append((key.shape, attention_mask))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("hook-test", attention)
    try:
        model.set_attn_implementation("hook-test")
        padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
        model(PROMPT, attention_mask=padding)
        assert seen[-1] == (torch.Size([1, 2, 8, 32]), None)
        AttentionMaskInterface.register("hook-test", lambda **arguments: arguments)
        model(PROMPT, attention_mask=padding)
        arguments = seen[-1][1]
        assert {
            "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function",
            "attention_mask", "allow_is_causal_skip", "device",
        } <= set(arguments)  # fmt: skip
        assert arguments["attention_mask"].dtype == torch.bool
    finally:
        AttentionInterface._global_mapping.pop("hook-test", None)
        AttentionMaskInterface._global_mapping.pop("hook-test", None)


@pytest.mark.parametrize("window", [None, 5])
def test_mask_functions_are_recognized(model, window: int | None) -> None:
    """masks.py knows a causal mask, and one with a window, by how transformers builds them."""
    seen: list[Any] = []
    config = model.config
    config.sliding_window = window
    name = "hook-test-mask"
    AttentionMaskInterface.register(
        name, lambda **arguments: seen.append(arguments["mask_function"])
    )
    try:
        config._attn_implementation_internal = name
        create = create_causal_mask if window is None else create_sliding_window_causal_mask
        arguments = {
            "config": config,
            "inputs_embeds": torch.zeros(1, 8, 64),
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": None,
        }
        known = inspect.signature(create).parameters
        create(**{key: value for key, value in arguments.items() if key in known})
        assert [causal_window(function) for function in seen] == [(True, window)]
        other = masks.and_masks(masks.causal_mask_function, lambda b, h, q, k: q >= k)
        assert causal_window(other) == (False, None)
    finally:
        AttentionMaskInterface._global_mapping.pop(name, None)


def test_cache_layers_are_asked_by_these_names() -> None:
    """layers.py and cache.py override these; a new abstract method would be missed."""
    assert CacheLayerMixin.__abstractmethods__ == {
        "__init__", "get_mask_sizes", "get_max_length", "get_seq_length", "lazy_initialization",
        "update",
    } - ({"__init__"} - CacheLayerMixin.__abstractmethods__)  # fmt: skip
    for name in ("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
        assert callable(getattr(Cache, name))
    assert callable(Cache.activate_past_recording)


def test_layer_types_come_from_the_config(model) -> None:
    """cache.py: which layers keep a window."""
    types, settings = get_layer_types_and_kwargs(model.config)
    assert list(types) == ["full_attention"] * 2
    assert list(settings) == [{}] * 2


def test_onednn_packs_a_weight() -> None:
    """linears.py: torch's own operators for packed weights, and the way back."""
    weight, rows = torch.randn(48, 32), torch.randn(3, 32)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    assert packed.is_mkldnn
    assert torch.equal(packed.to_dense(), weight)
    out = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    torch.testing.assert_close(out, rows @ weight.T)
