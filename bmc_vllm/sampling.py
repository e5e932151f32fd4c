"""Puts BMC's samplers into vLLM's model runner, and right what vLLM's own path needs beside them.

Promises that vLLM chooses and stores as before: what is replaced is one attribute of its sampler
and one of its runner, and a kernel for CPUs that writes nowhere, where it does. Knows nothing of
how tokens are drawn.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.rejection_sampler import RejectionSampler

from bmc_vllm.rejection_sampler import BMCRejectionSampler
from bmc_vllm.topk_topp_sampler import BMCTopKTopPSampler

logger = logging.getLogger("vllm.bmc")

EXPAND_KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def install_samplers(model_runner: Any) -> None:
    """Replaces the samplers of vLLM's GPUModelRunner or a subclass; others' are left alone."""
    sampler: Any = getattr(model_runner, "sampler", None)
    draw = getattr(sampler, "topk_topp_sampler", None)
    if type(draw) is TopKTopPSampler:
        precise = [draw.use_fp64_gumbel] if hasattr(draw, "use_fp64_gumbel") else []
        sampler.topk_topp_sampler = BMCTopKTopPSampler(draw.logprobs_mode, *precise)
    if type(getattr(model_runner, "rejection_sampler", None)) is RejectionSampler:
        model_runner.rejection_sampler = BMCRejectionSampler(
            sampler, model_runner.speculative_config, model_runner.device
        )


def repair_expand_kernel() -> None:
    """Registers a kernel that gives each draft token its request's temperature, where vLLM's for
    CPUs does not (vllm#55005); after vLLM's, and before anything imports numba, which vLLM's
    registration trips over. The rejection sampler's own path calls it."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON or _expands():
        return
    from vllm.triton_utils.dispatcher import register_kernels

    logger.info("BMC: vLLM's kernel that expands settings to draft tokens is broken: replaced")
    register_kernels({EXPAND_KERNEL: expand})


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # noqa: N803
) -> None:
    """Each of `[requests]` values once for each of its draft tokens, with one value replaced."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    changed = values.masked_fill(values == replace_from, replace_to)
    output.copy_(changed.repeat_interleave(counts))


def _expands() -> bool:
    """Whether the kernel in use writes what it is asked for."""
    from vllm.v1.sample import rejection_sampler

    out = torch.full((3,), float("nan"))
    given, ends = torch.tensor([0.7, 0.0]), torch.tensor([1, 3], dtype=torch.int32)
    rejection_sampler.expand_kernel[(2,)](out, given, ends, 0, 1, MAX_NUM_TOKENS=4)
    return out.tolist() == torch.tensor([0.7, 1.0, 1.0]).tolist()
