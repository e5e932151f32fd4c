"""Speculative decoding with everything that requests may ask of sampling, in an engine.

A request's tokens are those of stock vLLM without speculation: greedy ones, and those of a seed.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import ascii_lowercase, digits
from typing import NamedTuple

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.support.engines import engine, flush, prompts_of, scheduler
from tests.support.models import VOCAB, ModelStore

COMMON = {"max_tokens": 24, "ignore_eos": True, "detokenize": False}
REQUESTS = [
    SamplingParams(temperature=0, logprobs=2, **COMMON),
    SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5, **COMMON),
    SamplingParams(temperature=0.8, seed=1, **COMMON),
    SamplingParams(temperature=0.5, seed=2, top_p=0.9, logprobs=0, **COMMON),
    SamplingParams(temperature=0.7, seed=3, top_k=5, **COMMON),
    SamplingParams(temperature=0.7, seed=4, top_k=50, top_p=0.8, frequency_penalty=0.4, **COMMON),
    SamplingParams(temperature=0.6, seed=5, n=2, **COMMON),
    SamplingParams(temperature=0.5, seed=6, allowed_token_ids=list(range(20, 90)), **COMMON),
    SamplingParams(
        temperature=0,
        min_tokens=9,
        stop_token_ids=list(range(0, 512, 3)),
        max_tokens=24,
        detokenize=False,
    ),
]
PROMPTS = prompts_of([40, 7, 90, 33, 21, 60, 15, 28, 50])


class Answers(NamedTuple):
    """Of every sequence."""

    tokens: list[list[int]]
    logprobs: list[list[float]]  # of those tokens; empty where not asked for


def answers(llm: LLM) -> Answers:
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, [one.clone() for one in REQUESTS], use_tqdm=False)
    found = Answers([], [])
    for one in (one for output in outputs for one in output.outputs):
        tokens = list(one.token_ids)
        places = zip(one.logprobs or (), tokens, strict=bool(one.logprobs))
        found.tokens.append(tokens)
        found.logprobs.append([place[token].logprob for place, token in places])
    return found


@pytest.fixture(scope="module")
def expected(model_dir: ModelStore) -> Answers:
    with engine(model_dir("llama-gqa"), "CPU_ATTN") as llm:
        return answers(llm)


def speculating(model_dir: ModelStore, **settings: object) -> dict:
    """The model is its own draft: its greedy tokens are often what is drawn."""
    model = model_dir("llama-gqa")
    return {"method": "draft_model", "model": model, "num_speculative_tokens": 3, **settings}


def accepted_tokens(llm: LLM) -> list[int]:
    """Draft tokens that are accepted from now on, by request and step."""
    counts: list[int] = []
    count = scheduler(llm).make_spec_decoding_stats

    def counting(*arguments: object, num_accepted_tokens: int, **others: object) -> object:
        counts.append(num_accepted_tokens)
        return count(*arguments, num_accepted_tokens=num_accepted_tokens, **others)

    scheduler(llm).make_spec_decoding_stats = counting
    return counts


def compare(found: Answers, expected: Answers) -> None:
    assert found.tokens == expected.tokens
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_tokens_are_those_without_speculation(model_dir: ModelStore, expected: Answers) -> None:
    settings = speculating(model_dir)
    fixed = {"bmc": {"draft_length": "fixed"}}
    with engine(
        model_dir("llama-gqa"), "BMC", speculative_config=settings, additional_config=fixed
    ) as llm:
        accepted = accepted_tokens(llm)
        for _ in range(2):  # seeds repeat
            compare(answers(llm), expected)
        assert sum(accepted) > 50
        flush(llm)


def test_without_speculation_too(model_dir: ModelStore, expected: Answers) -> None:
    with engine(model_dir("llama-gqa"), "BMC") as llm:
        compare(answers(llm), expected)


def test_drafts_of_probabilities(model_dir: ModelStore, expected: Answers) -> None:
    """Greedy requests beside others; the others' tokens are another draw."""
    settings = speculating(model_dir, draft_sample_method="probabilistic")
    with engine(model_dir("llama-gqa"), "BMC", speculative_config=settings) as llm:
        found = answers(llm)
    assert [len(tokens) for tokens in found.tokens[:-1]] == [24] * (len(found.tokens) - 1)
    for greedy in (0, 1, -1):
        assert found.tokens[greedy] == expected.tokens[greedy]


def save_tokenizer(folder: Path) -> str:
    """Letters, digits, and pairs of letters up to the models' vocabulary."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pairs = [first + second for first in ascii_lowercase for second in ascii_lowercase]
    words = ["<unk>", "</s>", *ascii_lowercase, *digits, *pairs][:VOCAB]
    merges = [(word[0], word[1]) for word in words if word in pairs]
    model = BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    return str(folder)


def test_structured_output(model_dir: ModelStore, tmp_path: Path) -> None:
    """A grammar forbids tokens in the rows of the draft tokens too."""
    pattern = "[a-d]{3}(x[0-9]){4,9}z+"
    settings = {"skip_tokenizer_init": False, "tokenizer": save_tokenizer(tmp_path)}
    found = []
    for backend, speculative in (("CPU_ATTN", None), ("BMC", speculating(model_dir))):
        with engine(
            model_dir("llama-gqa"), backend, speculative_config=speculative, **settings
        ) as llm:
            params = [
                SamplingParams(
                    temperature=temperature,
                    seed=3,
                    max_tokens=30,
                    structured_outputs=StructuredOutputsParams(regex=pattern),
                )
                for temperature in (0.0, 1.0)
            ]
            prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:2]]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append([output.outputs[0].text for output in outputs])
    assert found[0] == found[1]
    assert all(re.fullmatch(pattern, text) for text in found[1])
