"""The plain sampler draws vLLM's tokens, with seeds and without."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from bmc_vllm.topk_topp_sampler import BMCTopKTopPSampler, draws_as_vllm, row_seeds

ROWS, VOCAB = 6, 3000


def arguments(top_k: int | None, top_p: float | None) -> tuple:
    logits = 3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    generators = {i: torch.Generator().manual_seed(i) for i in (1, 4)}
    k = None if top_k is None else torch.tensor([top_k, VOCAB] * 3, dtype=torch.int32)
    p = None if top_p is None else torch.tensor([top_p, 1.0, 0.3] * 2)
    return logits, generators, k, p


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits", "processed_logprobs"])
@pytest.mark.parametrize("settings", [(None, None), (20, None), (None, 0.9), (50, 0.8)])
@pytest.mark.parametrize("known", [True, False])
def test_tokens_and_logits_are_vllms(
    mode: str, settings: tuple, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:  # a vLLM that draws in another way
        monkeypatch.setattr("bmc_vllm.topk_topp_sampler.draws_as_vllm", lambda: False)
    found = []
    for kind in (BMCTopKTopPSampler, TopKTopPSampler):
        torch.manual_seed(7)
        tokens, shown = kind(mode)(*arguments(*settings))
        found.append((tokens, shown, torch.rand(1)))
    (tokens, shown, after), (expected, stock_shown, stock_after) = found
    assert torch.equal(tokens, expected)
    assert torch.equal(after, stock_after), "as many random numbers were drawn"
    if mode == "raw_logprobs":
        assert shown is None
    else:
        torch.testing.assert_close(shown, stock_shown)


def test_this_vllms_noise_is_the_one_known() -> None:
    assert draws_as_vllm()


def test_a_generator_gives_what_it_would_give_one_by_one() -> None:
    seeds = row_seeds([2, 3, 1], {1: torch.Generator().manual_seed(9)})
    one = torch.Generator().manual_seed(9)
    expected = [int(torch.randint(0, 2**31, (1,), generator=one)) for _ in range(3)]
    assert seeds[2:5].tolist() == expected
