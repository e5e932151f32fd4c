"""vLLM's samplers and BMC's on one step's logits, called as vLLM's model runner calls them.

A draft token has probability 0.7 in its row and the other words have normal logits, so that drafts
are often accepted and top-p has half of the vocabulary to choose from: less is never asked of it.
Promises that both sides get the same logits and settings. Knows nothing of clocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from benchmarks.sampling.cases import Case
from bmc_vllm.rejection_sampler import BMCRejectionSampler
from bmc_vllm.sampling import repair_expand_kernel
from bmc_vllm.topk_topp_sampler import BMCTopKTopPSampler, row_seeds

DTYPE = torch.bfloat16
DRAFT_PROBABILITY = 0.7
TOP_P = 0.9


def prepare() -> None:
    """vLLM's kernels for CPUs. The one that is broken is repaired for both sides, else vLLM's would
    be timed at random temperatures."""
    current_platform.register_triton_kernel_overrides()
    repair_expand_kernel()


class Step:
    """One step: logits, draft tokens, settings."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.vocab)
        logits = torch.randn(case.rows, case.vocab, generator=generator)
        tokens = torch.randint(0, case.vocab, (case.rows,), generator=generator)
        others = logits.scatter(1, tokens.unsqueeze(1), -torch.inf).logsumexp(1, keepdim=True)
        share = torch.tensor(DRAFT_PROBABILITY)
        logits.scatter_(1, tokens.unsqueeze(1), others + torch.logit(share))
        self.logits = logits.to(DTYPE)
        self.drafts = self._drafts(tokens)
        greedy = case.mode == "greedy"
        self.settings = _settings(case.batch, greedy, TOP_P if case.mode == "top-p" else None)

    def _drafts(self, tokens: torch.Tensor) -> SpecDecodeMetadata | None:
        if self.case.drafts is None:
            return None
        rows = torch.arange(self.case.rows, dtype=torch.int32).view(self.case.batch, -1)
        drafts = tokens.view(self.case.batch, -1)[:, :-1]
        metadata = SpecDecodeMetadata.make_dummy(drafts.tolist(), torch.device("cpu"))
        metadata.target_logits_indices = rows[:, :-1].flatten()
        metadata.bonus_logits_indices = rows[:, -1].contiguous()
        return metadata

    def seeded(self) -> SamplingMetadata:
        generators = {i: torch.Generator().manual_seed(i) for i in range(self.case.batch)}
        return replace(self.settings, generators=generators)

    def expected(self) -> list[list[int]]:
        """Tokens of the seeds: what vLLM's plain sampler draws row by row, up to the first that is
        not the draft token."""
        counts = [self.case.rows // self.case.batch] * self.case.batch
        seeds = row_seeds(counts, self.seeded().generators)
        values = self.logits.float()
        if self.case.mode == "greedy":
            tokens = values.argmax(1)
        else:
            if self.settings.top_p is not None:
                values = _sorted_top_p(values, TOP_P)
            tokens = torch.ops._C.fused_gumbel_argmax(values, seeds)
        drafted = self.drafts.draft_token_ids.tolist() if self.drafts is not None else []
        return [
            _up_to_the_first_wrong(row, drafted[i * (len(row) - 1) : (i + 1) * (len(row) - 1)])
            for i, row in enumerate(tokens.view(self.case.batch, -1).tolist())
        ]


class Side:
    """Samplers as one backend selects them."""

    name: str
    title: str

    def __init__(self, step: Step) -> None:
        self.step = step
        self.plain: Any = Sampler()
        self.rejection: Any = RejectionSampler(self.plain)

    def sample(self, settings: SamplingMetadata | None = None) -> SamplerOutput:
        step = self.step
        asked = settings or step.settings
        if step.drafts is None:
            return self.plain(logits=step.logits, sampling_metadata=asked)
        return self.rejection(step.drafts, None, step.logits, asked)


class VLLMSide(Side):
    name, title = "vllm", "vLLM"


class BMCSide(Side):
    name, title = "bmc", "BMC"

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self.plain.topk_topp_sampler = BMCTopKTopPSampler()
        self.rejection = BMCRejectionSampler(self.plain)


def _settings(batch: int, greedy: bool, top_p: float | None) -> SamplingMetadata:
    zeros = torch.zeros(batch)
    return SamplingMetadata(
        temperature=None if greedy else torch.ones(batch),
        all_greedy=greedy,
        all_random=not greedy,
        top_p=None if top_p is None else torch.full((batch,), top_p),
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=zeros,
        presence_penalties=zeros,
        repetition_penalties=torch.ones(batch),
        output_token_ids=[[] for _ in range(batch)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        spec_token_ids=[[] for _ in range(batch)],
    )


def _sorted_top_p(values: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = values.sort(dim=1, stable=True)
    drop = ordered.double().softmax(1).cumsum(1) <= 1 - top_p
    drop[:, -1] = False
    return values.scatter(1, order, ordered.masked_fill(drop, -torch.inf))


def _up_to_the_first_wrong(tokens: list[int], drafted: list[int]) -> list[int]:
    right = 0
    while right < len(drafted) and tokens[right] == drafted[right]:
        right += 1
    return tokens[: right + 1]
