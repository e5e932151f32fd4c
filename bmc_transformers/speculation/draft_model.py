"""Drafts of an assistant model, by a plain loop over its forwards.

transformers runs a whole `assistant.generate` in every round, which costs more than the forwards of
a small assistant. Here a round is one forward for the rows that the assistant has not seen, however
many they are (after a time without drafts, all of them at once), and one for each further token.

Promises that the cache holds no row of a rejected token when the assistant goes on. Drafts are the
most probable tokens, also where the model samples (see `SteeredGenerator`).
"""

from __future__ import annotations

import inspect
from time import perf_counter
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import LogitsProcessorList, PreTrainedModel

from bmc_transformers.cache import BMCCache
from bmc_transformers.speculation.processors import without_warpers
from bmc_transformers.speculation.steering import SteeredGenerator, Steering

NAME = "draft model"

ENOUGH_DOUBTS, MOST_DOUBTS = 8, 64
"""Tokens that it was unsure of: before they say what its doubts are worth, and as it forgets."""


class Doubts:
    """Whether a draft model is right to be unsure: drafts end at its doubts as long as it is.

    Args:
        always: they end there in any case.
    """

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._seen = 0.0
        self._unfounded = 0.0

    @property
    def end_drafts(self) -> bool:
        """Whether most tokens that it was unsure of were wrong, as far as is known."""
        known = self._seen >= ENOUGH_DOUBTS and not self._always
        return not known or 2 * self._unfounded <= self._seen

    def observe(self, was_right: bool) -> None:
        """A token that it was unsure of was verified behind none that was wrong."""
        if self._seen >= MOST_DOUBTS:
            self._seen, self._unfounded = self._seen / 2, self._unfounded / 2
        self._seen += 1
        self._unfounded += was_right


class DraftModelGenerator(SteeredGenerator):
    """Candidates for `assistant_model`; further arguments as `SteeredGenerator`.

    Args:
        assistant: has the model's vocabulary.
        cache: an empty cache of the assistant's.
        attention_mask: `[1, prompt]`; None: nothing is padded.
        position_ids: `[1, prompt]`; None: from 0 on.
        confidence: a round's drafts end behind a token that the assistant gives less probability;
            0: never.
        doubts: whether they do.
        logits_processor: those of `generate`.
    """

    def __init__(
        self,
        steering: Steering,
        *,
        assistant: PreTrainedModel,
        cache: BMCCache,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        confidence: float,
        doubts: Doubts,
        logits_processor: LogitsProcessorList,
        **common: Any,
    ) -> None:
        super().__init__(steering, **common)
        self.cache = cache
        self._assistant = assistant
        self._confidence = confidence
        self._doubts = doubts
        # Places in the round's drafts.
        self._unsure: list[int] = []
        self._processors: Any = without_warpers(logits_processor)
        self._drafter = NAME
        self._mask = attention_mask
        self._positions = position_ids
        accepted = inspect.signature(assistant.forward).parameters
        self._arguments: dict[str, Any] = (
            {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        )
        if "position_ids" not in accepted:
            self._positions = None
        # Tokens of the sequence that the cache was filled from, and of drafts behind them.
        self._seen = 0
        self._ahead: list[int] = []
        cache.activate_past_recording()

    def _draft(self, input_ids: torch.Tensor, limit: int) -> list[int]:
        steps = self.steering.draft_steps(input_ids, limit, NAME)
        if not steps:
            return []
        started = perf_counter()
        ids = input_ids.to(self._assistant.device)
        cached = self._drop_rejected(ids)
        missed = ids.shape[1] - cached
        drafts = self._loop(ids, cached, steps)
        # A round that catches up on rows which it missed says nothing of the others' cost.
        if missed <= 2:
            self._drafting = perf_counter() - started
        else:
            self._made = 0
        return drafts

    def update_candidate_strategy(
        self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        for place in self._unsure:
            if place < self._proposed and place <= num_matches:
                self._doubts.observe(place < num_matches)
        self._unsure = []
        super().update_candidate_strategy(input_ids, scores, num_matches)

    def _drop_rejected(self, ids: torch.Tensor) -> int:
        """Forgets rows of tokens that are not in the sequence; returns how many stay."""
        verified = ids[0, self._seen : self._seen + len(self._ahead)].tolist()
        right = 0
        while right < len(verified) and verified[right] == self._ahead[right]:
            right += 1
        held = self.cache.get_seq_length()
        kept = min(held, self._seen + right)
        # Also where it forgets none: a window drops older rows only then.
        self.cache.crop(kept - held)
        return kept

    def _loop(self, ids: torch.Tensor, cached: int, steps: int) -> list[int]:
        drafts: list[int] = []
        self._seen, self._ahead = ids.shape[1], drafts
        self._unsure = []
        rows = ids[:, cached:]
        for _ in range(steps):
            logits = self._logits(rows, cached)
            cached += rows.shape[1]
            self._made += 1
            if self._processors:
                logits = self._processors(ids, logits.to(torch.float32))
            rows = logits.argmax(dim=-1, keepdim=True)
            token = int(rows)
            if token in self._eos:
                break
            drafts.append(token)
            if self._is_unsure(logits, token):
                self._unsure.append(len(drafts) - 1)
                if self._doubts.end_drafts:
                    break
            if self._processors:
                ids = torch.cat((ids, rows), dim=1)
        return list(drafts)

    def _logits(self, rows: torch.Tensor, cached: int) -> torch.Tensor:
        """Scores `[1, vocabulary]` of what follows `rows`, which follow `cached` rows."""
        end = cached + rows.shape[1]
        arguments = dict(self._arguments)
        if self._mask is not None:
            further = max(0, end - self._mask.shape[1])
            arguments["attention_mask"] = pad(self._mask, (0, further), value=1)[:, :end]
        if self._positions is not None:
            arguments["position_ids"] = _positions(self._positions, cached, end)
        return self._assistant(
            input_ids=rows, past_key_values=self.cache, use_cache=True, **arguments
        ).logits[:, -1]

    def _is_unsure(self, logits: torch.Tensor, token: int) -> bool:
        if not self._confidence:
            return False
        scores = logits[0].to(torch.float32)
        return (scores[token] - scores.logsumexp(0)).exp().item() < self._confidence


def _positions(prompt: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Positions of the rows from `start` to `end`; behind the prompt's they go on by one."""
    rows = prompt.shape[1]
    if end <= rows:
        return prompt[:, start:end]
    first = max(start, rows)
    further = torch.arange(first - rows + 1, end - rows + 1, device=prompt.device)
    further = prompt[:, -1:] + further[None].to(prompt.dtype)
    return torch.cat((prompt[:, start:], further), dim=1) if start < rows else further
