"""The pair of a target and its draft: acceptance follows epsilon, and the text is known."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.lib.ceilings import threads_set
from benchmarks.lib.chain import (
    ChainLlama,
    agreement,
    continuation,
    copying_prompts,
    hard_prompts,
    tuned,
)
from benchmarks.lib.llama import TINY, LlamaShape

SHAPE = replace(TINY, layers=4, dtype="float32")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several would wait for each other longer than they compute."""
    with threads_set(1):
        yield


def chain(epsilon: float, shape: LlamaShape = SHAPE) -> ChainLlama:
    return ChainLlama(shape, 128, epsilon=epsilon)


@torch.inference_mode()
def greedy(model: ChainLlama, prompt: list[int], new: int) -> list[int]:
    out = model.module.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=new,
        do_sample=False,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_the_draft_is_the_targets_first_layers() -> None:
    target = chain(0.7).module.state_dict()
    draft = chain(0.7).draft().module.state_dict()
    assert {name for name in target if ".layers.0." not in name} > set(draft) - set(target)
    assert all(torch.equal(weight, target[name]) for name, weight in draft.items())
    assert len(draft) < len(target)


def test_acceptance_falls_with_epsilon() -> None:
    assert agreement(chain(0.0)) == 1.0
    middle = tuned(chain(0.0), 0.5).epsilon
    shares = [agreement(chain(share * middle)) for share in (0.0, 0.5, 1.0, 1.5, 4.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.2


@pytest.mark.parametrize("wanted", [0.3, 0.7])
def test_epsilon_is_found_for_an_acceptance(wanted: float) -> None:
    found = tuned(chain(0.0), wanted)
    assert found.epsilon > 0
    assert agreement(found) == pytest.approx(wanted, abs=0.03)


def test_an_acceptance_that_no_epsilon_gives_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted=1; allowed: more than 0, less than 1"):
        tuned(chain(0.0), 1)


@pytest.mark.parametrize("epsilon", [0.0, 200.0])
def test_plain_text_is_known_whatever_epsilon(epsilon: float) -> None:
    (prompt,) = copying_prompts(SHAPE.vocabulary, 1, 40, 0.8)
    assert greedy(chain(epsilon), prompt, 12) == continuation(SHAPE.vocabulary, prompt, 12)


def test_hard_text_stays_hard() -> None:
    """Else a text would leave the half on which the acceptance was measured."""
    model = tuned(chain(0.0), 0.5)
    (prompt,) = hard_prompts(SHAPE.vocabulary, 1, 24)
    text = greedy(model, prompt, 60)
    assert min(text) >= SHAPE.vocabulary // 2
    assert text != greedy(chain(0.0), prompt, 60)


def test_a_wrong_draft_is_always_wrong() -> None:
    """Also where the target's layers elect a token by noise, but for chance."""
    model = chain(0.0)
    (prompt,) = hard_prompts(SHAPE.vocabulary, 1, 24)
    with torch.inference_mode():
        ours, drafted = (
            one.module(input_ids=torch.tensor([prompt])).logits.argmax(-1)
            for one in (model, model.draft(wrong=True))
        )
    assert not (ours == drafted).any()


@pytest.mark.parametrize("acceptance", [0.6, 0.9])
def test_prompts_hold_the_text_with_strays(acceptance: float) -> None:
    """What an n-gram finds after a token is the model's next token at that rate."""
    vocabulary = 8192
    prompts = copying_prompts(vocabulary, 3, 1000, acceptance)
    assert len({prompt[0] for prompt in prompts}) == 3
    for prompt in prompts:
        assert len(prompt) == 1000
        body = prompt[:-1]
        assert prompt[-1] == body[0]
        pairs = [(a, b) for a, b in itertools.pairwise(body) if a < vocabulary // 2]
        right = sum(b == a + 1 for a, b in pairs)
        assert right / len(pairs) == pytest.approx(acceptance, abs=0.06)
