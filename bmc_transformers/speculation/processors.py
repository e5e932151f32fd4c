"""Which logits processors a drafter must ask.

Knows the processors of transformers by class; one that it does not know is asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

KEEP_THE_ARGMAX = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
)
"""The most probable token stays the most probable one: a greedy drafter need not ask them."""

JUDGE_ANY_TEXT = (
    *KEEP_THE_ARGMAX,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
)
"""They score any text, also behind a token that they forbid: its verification rejects it."""


def without_warpers(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that may change which token is the most probable one."""
    return LogitsProcessorList(p for p in processors if type(p) not in KEEP_THE_ARGMAX)


def without_harmless(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that must not be shown a text that they forbid: a grammar may have no answer."""
    return LogitsProcessorList(p for p in processors if type(p) not in JUDGE_ANY_TEXT)


def forbids(
    processors: Callable[..., torch.Tensor], sequence: torch.Tensor, token: int, vocabulary: int
) -> bool:
    """Whether they give `token` no chance behind `sequence` `[1, length]`."""
    scores = torch.ones((1, vocabulary), dtype=torch.float32, device=sequence.device)
    score = processors(sequence, scores)[0, token].item()
    return score <= torch.finfo(torch.float32).min
