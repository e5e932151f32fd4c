"""Speculation in `generate`: the text of the model alone, whatever is drafted."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from bmc_core.policy import BMCPolicy
from bmc_core.speculation import SpeculationController
from bmc_transformers import BMCCache, disable, enable, is_enabled, speculation_stats
from tests.support.architectures import SCENARIOS, build, draft, expected, generated, prompt
from tests.support.drafts import always_wrong, pair

SETTINGS = ("auto", "fixed")


def certain(assistant: PreTrainedModel, tokens: int = 5) -> PreTrainedModel:
    """The assistant drafts this many tokens in each round, however unsure it is."""
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = tokens
    return assistant


def text(model: PreTrainedModel, tokens: int = 60, **arguments: Any) -> Any:
    return generated(model, {"inputs": prompt(1), **arguments}, tokens)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("scenario", ["assisted", "lookup"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mistral", "bloom"])
def test_tokens_are_the_stock_ones(name: str, scenario: str, setting: str) -> None:
    model = build(name)
    arguments = SCENARIOS[scenario](model)
    if scenario == "assisted":
        certain(arguments["assistant_model"])
    enable(model, 16, speculate=setting)
    output = generated(model, arguments)
    assert isinstance(output.past_key_values, BMCCache)
    assert torch.equal(output.sequences, expected(name, scenario))
    stats = speculation_stats(model)
    assert stats.rounds > 0
    # A draft model as large as the model does not pay.
    assert stats.draft_tokens > 0 or (scenario, setting) == ("assisted", "auto")
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "opt", "mistral"])
def test_left_padding_is_drafted_for_too(name: str, setting: str) -> None:
    arguments = {"inputs": prompt(1), "attention_mask": torch.tensor([[0] * 6 + [1] * 15])}
    stock = generated(build(name), arguments).sequences
    model = enable(build(name), 16, speculate=setting)
    assistant = certain(build(name))
    output = generated(model, arguments | {"assistant_model": assistant})
    assert torch.equal(output.sequences, stock)
    stats = speculation_stats(model)
    assert stats.accepted_tokens == stats.draft_tokens
    assert stats.draft_tokens > 0 or setting == "auto"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_draft_model_that_is_the_model_is_always_right(name: str) -> None:
    model = enable(build(name), 16, speculate="fixed")
    output = text(model, assistant_model=certain(build(name)))
    stats = speculation_stats(model)
    assert stats.accepted_tokens == stats.draft_tokens
    # 60 tokens, 6 in a round
    assert (stats.rounds, stats.draft_tokens) == (10, 50)
    assert torch.equal(output.sequences, text(build(name)).sequences)
    itself = text(model, assistant_model=certain(model))
    assert torch.equal(itself.sequences, output.sequences)


def test_a_draft_model_that_is_always_wrong_is_parked() -> None:
    target, draft_model = pair(0.0)
    stock = text(target, 300).sequences
    enable(target, 16, speculate="auto")
    wrong = certain(always_wrong(draft_model))
    assert torch.equal(text(target, 300, assistant_model=wrong).sequences, stock)
    stats = speculation_stats(target)
    assert stats.accepted_tokens == 0
    assert stats.parked_rounds > 0.8 * stats.rounds


def forwards_of(model: PreTrainedModel) -> list[int]:
    """The rows of each forward from now on."""
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return rows


def scripted(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """The controller wants these numbers of draft tokens in turn, then 0."""
    wanted: Iterator[int] = iter(steps)
    monkeypatch.setattr(SpeculationController, "draft_steps", lambda *_: next(wanted, 0))


def test_a_parked_draft_model_costs_nothing_and_catches_up(monkeypatch) -> None:
    scripted(monkeypatch, [3, 3, *[0] * 10, 3, 3])
    target, same = pair(0.0)
    stock = text(target).sequences
    rows = forwards_of(same)
    enable(target, 16, speculate="fixed")
    output = text(target, assistant_model=certain(same))
    assert torch.equal(output.sequences, stock)
    # The prompt, drafts; two rows after a round that was right; the 12 that it missed, at once.
    assert rows == [21, 1, 1, 2, 1, 1, 12, 1, 1, 2, 1, 1]
    stats = speculation_stats(target)
    assert stats.accepted_tokens == stats.draft_tokens == 12


def test_one_that_never_pays_never_sees_the_prompt(monkeypatch) -> None:
    scripted(monkeypatch, [])
    target, same = pair(0.0)
    rows = forwards_of(same)
    text(enable(target, 16, speculate="fixed"), assistant_model=same)
    assert rows == []


def test_rejections_copy_nothing() -> None:
    model = build("llama")
    enable(model, BMCPolicy.up_front(), speculate="fixed")
    stats = text(model, assistant_model=certain(draft(build("llama")))).past_key_values.stats()
    done = speculation_stats(model)
    assert 0 < done.accepted_tokens < done.draft_tokens
    assert (stats.growths, stats.copies, stats.rows_copied) == (2, 0, 0)


@pytest.mark.parametrize("setting", [None, *SETTINGS])
def test_growth_counts_the_draft_tokens(setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from bmc_transformers import generation

    seen = []
    real = generation.policy_for

    def policy_for(model: Any, policy: Any, **settings: Any) -> Any:
        seen.append(settings["draft_tokens"])
        return real(model, policy, **settings)

    monkeypatch.setattr(generation, "policy_for", policy_for)
    model = enable(build("llama"), 16, speculate=setting)
    text(model, 4, assistant_model=certain(draft(build("llama")), 7))
    text(model, 4, prompt_lookup_num_tokens=3)
    text(model, 4, num_beams=2)
    assert seen == [7, 0, 3, 0]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("schedule", ["heuristic", "heuristic_transient", "constant"])
def test_the_number_of_draft_tokens_does_not_leak(setting: str, schedule: str) -> None:
    model = enable(build("llama"), 16, speculate=setting)
    assistant = certain(draft(build("llama")))
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    before = assistant.generation_config.to_dict()
    text(model, assistant_model=assistant)
    # The candidates stay transformers' own here.
    text(model, assistant_model=assistant, assistant_ensemble_weight=0.5)
    assert assistant.generation_config.to_dict() == before


class TestLookupThatNobodyAskedFor:
    """`generate` is told of no speculation, `enable` was."""

    def test_it_gives_the_same_text(self) -> None:
        model = enable(build("llama"), 16, speculate="auto")
        stock = text(build("llama"), 200, output_scores=True, output_logits=True)
        output = text(model, 200, output_scores=True, output_logits=True)
        assert torch.equal(output.sequences, stock.sequences)
        assert speculation_stats(model).accepted_tokens > 0
        assert len(output.scores) == len(output.logits) == 200
        torch.testing.assert_close(torch.stack(output.scores), torch.stack(stock.scores))

    def test_a_generation_config_is_left_alone(self) -> None:
        model = enable(build("llama"), 16, speculate="auto")
        config = copy.deepcopy(model.generation_config)
        config.max_new_tokens = 60
        before = config.to_dict()
        output = model.generate(prompt(1), config)
        assert torch.equal(output, text(build("llama")).sequences)
        assert speculation_stats(model).draft_tokens > 0
        assert config.to_dict() == before

    @pytest.mark.parametrize(
        "arguments",
        [
            {"stopping_criteria": [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 40])]},
            {"logits_processor": LogitsProcessorList([lambda ids, scores: scores + 1])},
            {"prefix_allowed_tokens_fn": lambda batch, ids: [int(ids[-1]) % 90 + 3, 5]},
            {"num_beams": 2},
            {"output_attentions": True},
            {"use_cache": False},
            {"past_key_values": DynamicCache()},
            {"prefill_chunk_size": 8},
        ],
    )
    def test_what_might_show_is_generated_without(self, arguments: dict[str, Any]) -> None:
        model = enable(build("llama"), 16, attention="stock", speculate="auto")
        output = text(model, 20, **copy.deepcopy(arguments))
        assert torch.equal(
            output.sequences, text(build("llama"), 20, **copy.deepcopy(arguments)).sequences
        )
        assert speculation_stats(model).rounds == 0

    def test_samples_keep_their_seed(self) -> None:
        model = enable(build("llama"), 16, speculate="auto")
        outputs = []
        for one in (model, build("llama")):
            torch.manual_seed(3)
            outputs.append(one.generate(prompt(1), do_sample=True, max_new_tokens=30))
        assert torch.equal(*outputs)

    def test_batches_do_without_and_say_so_once(self, caplog) -> None:
        model = enable(build("llama"), 16, speculate="auto")
        for _ in range(2):
            output = generated(model, {"inputs": prompt()})
        assert torch.equal(output.sequences, expected("llama", "plain"))
        assert caplog.text.count('speculate="auto" does nothing for batches') == 1

    def test_it_is_not_asked_for_by_the_other_settings(self) -> None:
        model = enable(build("llama"), 16, speculate="fixed")
        text(model)
        assert speculation_stats(model).rounds == 0
        assert speculation_stats(enable(model, 16)) is None


@pytest.mark.parametrize("setting", SETTINGS)
def test_batches_are_refused_by_name(setting: str) -> None:
    model = enable(build("llama"), 16, speculate=setting)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens=3 with a batch of 2 sequences"):
        model.generate(prompt(2), prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="assistant_model=LlamaForCausalLM with a batch of 2"):
        model.generate(prompt(2), assistant_model=build("llama"))


class Stream(BaseStreamer):
    """The tokens that it was given, and a chance to fail."""

    def __init__(self, fails_at: int = -1) -> None:
        self.tokens: list[int] = []
        self.calls = 0
        self.fails_at = fails_at

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_streams_processors_and_ends_are_as_without(setting: str) -> None:
    plain = text(build("llama"), repetition_penalty=1.3, output_scores=True)
    end = plain.sequences[0, 60].item()
    arguments = {
        "repetition_penalty": 1.3,
        "eos_token_id": end,
        "output_scores": True,
        "min_new_tokens": 3,
    }
    stock = text(build("llama"), **arguments)
    model = enable(build("llama"), 16, speculate=setting)
    for drafts in ({"assistant_model": certain(build("llama"))}, {"prompt_lookup_num_tokens": 4}):
        stream = Stream()
        output = text(model, streamer=stream, **arguments, **drafts)
        assert torch.equal(output.sequences, stock.sequences)
        assert stream.tokens == [*stock.sequences[0].tolist(), -1]
        assert len(output.scores) == len(stock.scores)
        torch.testing.assert_close(torch.stack(output.scores), torch.stack(stock.scores))


@pytest.mark.parametrize("drafts", ["assistant", "lookup"])
def test_a_grammar_is_never_shown_a_text_that_it_forbids(drafts: str) -> None:
    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        """Even and odd tokens in turn; it has no answer behind two of a kind."""
        if (ids[22:] % 2 == ids[21:-1] % 2).any():
            raise AssertionError("asked about a text that it forbids")
        return list(range(4 + (int(ids[-1]) + 1) % 2, 96, 2))

    stock = text(build("llama"), prefix_allowed_tokens_fn=allowed)
    model = enable(build("llama"), 16, speculate="fixed")
    arguments: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if drafts == "assistant":
        arguments = {"assistant_model": certain(draft(build("llama")))}
    output = text(model, prefix_allowed_tokens_fn=allowed, **arguments)
    assert torch.equal(output.sequences, stock.sequences)
    assert speculation_stats(model).draft_tokens > 0


@pytest.mark.parametrize("drafts", ["assistant", "lookup"])
@pytest.mark.parametrize("fails_at", [2, 3, 6])
def test_an_interrupted_round_leaves_verified_rows_only(fails_at: int, drafts: str) -> None:
    assistant = certain(draft(build("llama")))
    model = enable(build("llama"), 16, speculate="fixed")
    arguments: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if drafts == "assistant":
        arguments = {"assistant_model": assistant}
    cache, stream = BMCCache(model.config, 16), Stream(fails_at)
    with pytest.raises(KeyboardInterrupt):
        text(model, past_key_values=cache, streamer=stream, **arguments)
    assert not is_enabled(assistant)
    stock = text(build("llama")).sequences
    # The rows of the tokens that were streamed, the last of which was never fed.
    held = cache.get_seq_length()
    assert held == (len(stream.tokens) - 1 if fails_at > 2 else 0)
    assert stream.tokens == stock[0, : len(stream.tokens)].tolist()
    with torch.no_grad():
        logits = model(stock[:, held:], past_key_values=cache).logits
    first = max(held, 20)
    assert torch.equal(logits[:, first - held : -1].argmax(-1), stock[:, first + 1 :])
    assert torch.equal(text(model, **arguments).sequences, stock)


@pytest.mark.parametrize("kind", ["bmc", "dynamic"])
@pytest.mark.parametrize("drafts", ["assistant", "lookup"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_conversation_in_a_cache_of_the_users(name: str, drafts: str, kind: str) -> None:
    model, plain = enable(build(name), 16, speculate="fixed"), build(name)
    arguments: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if drafts == "assistant":
        arguments = {"assistant_model": certain(draft(build(name)))}
    cache = BMCCache(model.config, 16) if kind == "bmc" else DynamicCache(config=model.config)
    ids = prompt(1)
    for _ in range(3):
        stock = text(plain, 15, inputs=ids).sequences
        ids = text(model, 15, inputs=ids, past_key_values=cache, **arguments).sequences
        assert torch.equal(ids, stock)
        assert cache.get_seq_length() == ids.shape[1] - 1
        ids = torch.cat((ids, prompt(1)[:, :5]), dim=1)


def constant(probabilities: torch.Tensor) -> PreTrainedModel:
    """A model that expects the same next token whatever it has read."""
    model, _ = pair(0.0, layers=1, hidden=32, vocabulary=len(probabilities))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # The last norm makes every hidden state ones.
        model.lm_head.weight.copy_(probabilities.log()[:, None].expand(-1, 32) / 32)
    return model


@pytest.mark.parametrize("drafts", ["assistant", "lookup"])
def test_samples_have_the_distribution_of_the_model(drafts: str) -> None:
    """Drafts that are often right, drawn at temperature 2 from peaked logits: what a verification
    that takes them for draws of another kind would get wrong by 0.2 and more."""
    peaked = torch.tensor([0.80, 0.12, 0.05, 0.02, 0.008, 0.002])
    flat = peaked.sqrt() / peaked.sqrt().sum()
    model = enable(constant(peaked), 128, speculate="fixed")
    arguments: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if drafts == "assistant":
        arguments = {"assistant_model": certain(constant(peaked), 3)}
    torch.manual_seed(0)
    ids = model.generate(
        torch.tensor([[1, 0, 0, 0]]), do_sample=True, temperature=2.0, top_k=0, max_new_tokens=1200,
        **arguments,
    )  # fmt: skip
    drawn = torch.bincount(ids[0, 4:], minlength=6) / 1200
    assert (drawn - flat).abs().sum() / 2 < 0.06
    assert speculation_stats(model).accepted_tokens > 240


def test_an_assistant_of_another_kind_keeps_transformers_candidates(caplog) -> None:
    model = enable(build("llama"), 16, speculate="auto")
    embeddings = model.get_input_embeddings()(prompt(1)).detach()
    stock = build("llama").generate(inputs_embeds=embeddings, max_new_tokens=12)
    output = model.generate(inputs_embeds=embeddings, prompt_lookup_num_tokens=3, max_new_tokens=12)
    assert torch.equal(output, stock)
    arguments = {"assistant_early_exit": 1}
    assert torch.equal(text(model, **arguments).sequences, text(build("llama")).sequences)
    assert "EarlyExitCandidateGenerator" in caplog.text


def test_copies_and_pickles_learn_by_themselves() -> None:
    model = enable(build("llama"), 16, speculate="auto")
    text(model)
    stock = text(build("llama")).sequences
    twin = copy.deepcopy(model)
    assert speculation_stats(twin).rounds == 0
    assert torch.equal(text(twin).sequences, stock)
    assert speculation_stats(twin).rounds > 0
    assert torch.equal(text(pickle.loads(pickle.dumps(model))).sequences, stock)


def test_disable_takes_it_away() -> None:
    model = build("llama")
    before = dict(vars(model))
    text(enable(model, 16, speculate="auto"), prompt_lookup_num_tokens=3)
    assert vars(disable(model)) == before


@pytest.mark.parametrize("wrong", ["yes", True, 4, "off"])
def test_other_settings_are_named(wrong: Any) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="speculate=.*: allowed are .auto., .fixed. and None"):
        enable(model, speculate=wrong)
    assert not is_enabled(model)


def test_split_models_have_one_length_for_all_processes() -> None:
    model = build("llama")
    model._tp_size = 2
    with pytest.raises(ValueError, match='speculate="auto" with a model .* over 2 processes'):
        enable(model, speculate="auto")
    enable(model, speculate="fixed")
