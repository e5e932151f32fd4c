"""vLLM's rejection sampler on given logits, with the metadata that its runner makes."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


def draft_metadata(drafts: list[list[int]]) -> SpecDecodeMetadata:
    """Of draft tokens whose logits lie request by request, the bonus row last."""
    metadata = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    counts = torch.tensor([len(row) for row in drafts])
    ends = metadata.cu_num_sampled_tokens
    is_bonus = torch.zeros(int(counts.sum()) + len(drafts), dtype=torch.bool)
    is_bonus[(ends - 1).long()] = True
    metadata.bonus_logits_indices = ends - 1
    metadata.target_logits_indices = (~is_bonus).nonzero().view(-1).int()
    return metadata


def sampling_metadata(requests: int, **changes: Any) -> SamplingMetadata:
    """Of requests at temperature 1 that ask for nothing else."""
    zeros = torch.zeros(requests)
    settings: dict[str, Any] = {
        "temperature": torch.ones(requests),
        "all_greedy": False,
        "all_random": True,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": zeros,
        "presence_penalties": zeros,
        "repetition_penalties": torch.ones(requests),
        "output_token_ids": [[] for _ in range(requests)],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
        "spec_token_ids": [[] for _ in range(requests)],
    }
    return SamplingMetadata(**{**settings, **changes})
