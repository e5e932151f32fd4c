"""vLLM's draw of one token a row, with top-k and top-p found by selection instead of sorting.

Promises the token that vLLM draws: from the same seeds, taken from the same generators in the same
order, with the same noise where this vLLM's noise is the one known here (`draws_as_vllm`), else by
vLLM's own operator over what top-k and top-p keep. Knows nothing of draft tokens.
"""

from __future__ import annotations

import functools

import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from bmc_core.sampling import RequestSettings, keep_top, sample

SEED_END = 2**31
"""Seeds of rows are drawn below it, as vLLM does."""
_PROCESSED = ("processed_logits", "processed_logprobs")


class BMCTopKTopPSampler(TopKTopPSampler):
    """See the module docstring."""

    def forward_cpu(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        k = None if k is None else k.to(torch.int32)
        stock_draws = getattr(self, "use_fp64_gumbel", False) or not draws_as_vllm()
        if logits.dtype != torch.float32:
            return super().forward_cpu(logits, generators, k, p)
        if stock_draws or self.logprobs_mode in _PROCESSED:
            if k is not None or p is not None:
                keep_top(logits, k, p)
            return super().forward_cpu(logits, generators, None, None)
        rows = logits.shape[0]
        seeds = row_seeds([1] * rows, generators)
        return sample(logits, RequestSettings(torch.ones(rows), k, p), seeds).long(), None


def row_seeds(counts: list[int], generators: dict[int, torch.Generator]) -> torch.Tensor:
    """Seeds for so many rows of each request, `[rows]` int64.

    A request's generator gives the seeds that it would give one by one.
    """
    seeds = torch.randint(0, SEED_END, (sum(counts),))
    if generators:
        start = 0
        for request, count in enumerate(counts):
            if request in generators:
                seeds[start : start + count] = generator_seeds(generators[request], count)
            start += count
    return seeds


def generator_seeds(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.randint(0, SEED_END, (count,), generator=generator)


@functools.cache
def draws_as_vllm() -> bool:
    """Whether native code draws the tokens that this vLLM's operator draws."""
    operator = getattr(torch.ops._C, "fused_gumbel_argmax", None)
    if operator is None:
        return False
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(16, 500, generator=generator)
    seeds = torch.randint(0, SEED_END, (16,), generator=generator)
    ours = sample(logits, RequestSettings(torch.ones(16)), seeds)
    return torch.equal(ours.long(), operator(logits, seeds))
