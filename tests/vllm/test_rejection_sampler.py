"""What comes out of speculative sampling is the model's distribution, in vLLM's form.

The distribution is tested with draft tokens of a high probability, peaked logits and temperature 2:
stock vLLM 0.32 on CPUs verifies them at uninitialized temperatures, so that its total variation
from what it should give is 0.48 here, and 0.80 with other logits. Drafts that are seldom accepted
would show no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from vllm.config.model import LogprobsMode
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

from bmc_vllm import sampling
from bmc_vllm.rejection_sampler import BMCRejectionSampler
from bmc_vllm.topk_topp_sampler import BMCTopKTopPSampler
from tests.support.rejection import draft_metadata, sampling_metadata
from tests.support.sampling import kept, total_variation

VOCAB, DRAWS, TEMPERATURE = 24, 6000, 2.0
# Each position has its own likely token; the third row is that of the bonus token.
LIKELY = [3, 11, 17]
BOUND = 0.05


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """vLLM's kernels for CPUs, as a worker registers them, and ours after them."""
    current_platform.register_triton_kernel_overrides()
    sampling.repair_expand_kernel()
    return


def sampler_of(kind: type[RejectionSampler], mode: str = "raw_logprobs") -> RejectionSampler:
    plain = Sampler(logprobs_mode=mode)
    if kind is BMCRejectionSampler:
        plain.topk_topp_sampler = BMCTopKTopPSampler(mode)
    return kind(plain)


def peaked_logits() -> torch.Tensor:
    rows = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    for row, token in zip(rows, LIKELY, strict=True):
        row[token] += 7.0
    return rows


@pytest.mark.parametrize("kind", [BMCRejectionSampler, RejectionSampler])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.8), (6, 0.9)])
def test_draft_tokens_leave_the_distribution_as_it_is(
    kind: type[RejectionSampler], top_k: int | None, top_p: float | None
) -> None:
    """Ours, and vLLM's own path, which it falls back to."""
    torch.manual_seed(0)
    rows = peaked_logits()
    asked = sampling_metadata(
        DRAWS,
        temperature=torch.full((DRAWS,), TEMPERATURE),
        top_k=None if top_k is None else torch.full((DRAWS,), top_k, dtype=torch.int32),
        top_p=None if top_p is None else torch.full((DRAWS,), top_p),
    )
    metadata = draft_metadata([LIKELY[:2]] * DRAWS)
    tokens = sampler_of(kind)(metadata, None, rows.repeat(DRAWS, 1), asked).sampled_token_ids
    assert tokens.dtype == torch.int32
    for place, row in enumerate(rows):
        values = row / TEMPERATURE
        values[~kept(values, top_k or 0, top_p or 1.0)] = -torch.inf
        reached = tokens[:, place] != -1
        assert int(reached.sum()) > DRAWS / 4
        assert total_variation(tokens[reached, place], values.softmax(0)) < BOUND


def test_the_same_with_drafts_of_probabilities() -> None:
    torch.manual_seed(0)
    rows = peaked_logits()
    q = rows[:2].softmax(1).roll(1, 1) * 0.5 + rows[:2].softmax(1) * 0.5
    drafts = torch.stack([torch.multinomial(one, DRAWS, replacement=True) for one in q], 1)
    tokens = sampler_of(BMCRejectionSampler)(
        draft_metadata(drafts.tolist()),
        q.repeat(DRAWS, 1),
        rows.repeat(DRAWS, 1),
        sampling_metadata(DRAWS, temperature=torch.full((DRAWS,), TEMPERATURE)),
    ).sampled_token_ids
    for place, row in enumerate(rows):
        reached = tokens[:, place] != -1
        assert total_variation(tokens[reached, place], (row / TEMPERATURE).softmax(0)) < BOUND


def mixed_case() -> tuple[list[list[int]], torch.Tensor, dict]:
    """Greedy requests and others, with draft tokens and without."""
    torch.manual_seed(1)
    rows = 3 * torch.randn(9, VOCAB)
    best = rows.argmax(1).tolist()
    drafts = [best[0:2], [], [best[4], 1], [best[7]]]
    settings = {
        "temperature": torch.tensor([0.0, 0.0, 0.7, 0.7]),
        "all_random": False,
        "top_p": torch.tensor([1.0, 1.0, 0.5, 0.5]),
    }
    return drafts, rows, settings


@pytest.mark.parametrize("mode", get_args(LogprobsMode))
def test_logprobs_are_vllms(mode: str) -> None:
    drafts, rows, settings = mixed_case()
    settings["top_p"] = torch.tensor([1.0, 1.0, 1e-6, 1e-6])  # nothing is left to chance
    found = []
    for kind in (BMCRejectionSampler, RejectionSampler):
        asked = sampling_metadata(4, **settings, max_num_logprobs=3)
        output = sampler_of(kind, mode)(draft_metadata(drafts), None, rows.clone(), asked)
        tokens = output.sampled_token_ids
        used = (tokens != -1).flatten()
        logprobs = output.logprobs_tensors
        found.append([tokens, *(part[used] for part in logprobs[:3])])
    (tokens, ids, values, ranks), expected = found
    assert torch.equal(tokens, expected[0])
    assert torch.equal(ranks, expected[3])
    torch.testing.assert_close(values, expected[2])
    finite = torch.isfinite(values)  # which of the impossible tokens are shown is a matter of order
    assert torch.equal(ids[finite], expected[1][finite])


def test_logits_stay_as_they_are() -> None:
    drafts, rows, settings = mixed_case()
    for dtype in (torch.float32, torch.bfloat16):
        logits = rows.to(dtype)
        asked = sampling_metadata(4, **settings, max_num_logprobs=1)
        sampler_of(BMCRejectionSampler)(draft_metadata(drafts), None, logits, asked)
        assert torch.equal(logits, rows.to(dtype))


def test_a_step_without_draft_tokens_takes_the_plain_sampler() -> None:
    """Top-k of no rows ends vLLM's own."""
    rows = 3 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    asked = sampling_metadata(3, top_k=torch.tensor([1, 1, 1], dtype=torch.int32))
    sampler = sampler_of(BMCRejectionSampler)
    tokens = sampler(draft_metadata([[], [], []]), None, rows, asked).sampled_token_ids
    assert tokens.tolist() == rows.argmax(1, keepdim=True).tolist()


def generators() -> dict[int, torch.Generator]:
    return {i: torch.Generator().manual_seed(40 + i) for i in (0, 2)}


def test_a_seed_gives_the_tokens_that_it_gives_without_draft_tokens() -> None:
    rows = 2 * torch.randn(4, 3, VOCAB, generator=torch.Generator().manual_seed(3))
    sampler = sampler_of(BMCRejectionSampler)
    settings = {"top_p": torch.full((4,), 0.9)}
    plain, alone = generators(), []
    for step in range(3):
        asked = sampling_metadata(4, **settings, generators=plain)
        alone.append(Sampler()(rows[:, step].clone(), asked).sampled_token_ids)
    expected = torch.cat(alone, dim=1)
    for wrong in range(3):  # from which draft token on
        ours = generators()
        drafts = expected[:, :2].clone()
        drafts[:, wrong:] += 1
        asked = sampling_metadata(4, **settings, generators=ours)
        metadata = draft_metadata(drafts.tolist())
        tokens = sampler(metadata, None, rows.view(12, VOCAB), asked).sampled_token_ids
        for request, generator in ours.items():
            assert tokens[request, : wrong + 1].tolist() == expected[request, : wrong + 1].tolist()
            assert bool((tokens[request, wrong + 1 :] == -1).all())
            # As if it had been asked once for each of those tokens.
            again = generators()[request]
            torch.randint(0, 2**31, (wrong + 1,), generator=again)
            assert torch.equal(generator.get_state(), again.get_state())


def test_stop_tokens_are_forbidden_up_to_the_least_number_of_tokens() -> None:
    """In the rows of the draft tokens and in the one behind them; vLLM's own forbids them there
    though the draft tokens have reached the number."""
    rows = torch.zeros(6, VOCAB)
    rows[:, 5] = 9.0  # the stop token
    rows[:, 6] = 5.0
    processor = MinTokensLogitsProcessor(None, torch.device("cpu"), False)
    processor.min_toks = {0: (12, [1] * 10, {5}, False), 1: (13, [1] * 10, {5}, False)}
    processor.logits_slice = (torch.tensor([0, 1]), torch.tensor([5, 5]))
    asked = sampling_metadata(
        2,
        temperature=None,
        all_greedy=True,
        all_random=False,
        logitsprocs=LogitsProcessors([processor]),
    )
    metadata = draft_metadata([[6, 6], [6, 6]])
    tokens = sampler_of(BMCRejectionSampler)(metadata, None, rows, asked).sampled_token_ids
    assert tokens.tolist() == [[6, 6, 5], [6, 6, 6]]


@pytest.mark.parametrize("what", ["allowed", "bad words", "penalties"])
def test_what_forbids_tokens_is_vllms(what: str) -> None:
    drafts, rows, settings = mixed_case()
    settings |= {"temperature": None, "all_greedy": True, "top_p": None, "spec_token_ids": drafts}
    if what == "allowed":
        forbidden = torch.zeros(4, VOCAB, dtype=torch.bool)
        forbidden[2, drafts[2][0]] = forbidden[0, rows[2].argmax()] = True
        settings["allowed_token_ids_mask"] = forbidden
    elif what == "bad words":
        settings["bad_words_token_ids"] = {0: [[drafts[0][0], drafts[0][1]]], 3: [[drafts[3][0]]]}
    else:
        settings |= {
            "no_penalties": False,
            "prompt_token_ids": torch.full((4, 1), VOCAB),
            "repetition_penalties": torch.full((4,), 3.0),
            "output_token_ids": [[drafts[0][1]], [2], [drafts[2][0]], [1]],
        }
    found = []
    for kind in (BMCRejectionSampler, RejectionSampler):
        asked = sampling_metadata(4, **settings)
        output = sampler_of(kind)(draft_metadata(drafts), None, rows.clone(), asked)
        found.append(output.sampled_token_ids.tolist())
    assert found[0] == found[1]
    plain = sampling_metadata(4, temperature=None, all_greedy=True, all_random=False)
    free = sampler_of(BMCRejectionSampler)(draft_metadata(drafts), None, rows.clone(), plain)
    assert found[0] != free.sampled_token_ids.tolist()


def test_the_kernel_is_replaced_only_where_it_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampling._expands()
    before = rejection_sampler.expand_kernel
    sampling.repair_expand_kernel()
    assert rejection_sampler.expand_kernel is before
