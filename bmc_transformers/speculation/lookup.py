"""Prompt lookup: the text's end stood somewhere before, and what followed there may follow again.

Promises the longest earlier occurrence of the end, the newest of several, found in time that does
not grow with the text. Knows nothing of models; the drafts cost nothing but their verification.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList

from bmc_transformers.speculation.processors import forbids, without_harmless
from bmc_transformers.speculation.steering import SteeredGenerator, Steering

LONGEST_MATCH = 16
"""Where the user names no size: longer matches promise no more."""

MOST_PLACES = 64
"""So many earlier occurrences of the last two tokens are compared, the newest first."""


class SuffixIndex:
    """Where in a sequence of tokens its own end has been before."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        # The newest position of each token and each pair of tokens, and the one before that.
        self._newest: dict[int, int] = {}
        self._before_last = -1
        self._newest_pair: dict[tuple[int, int], int] = {}
        self._pair_before: list[int] = []

    def extend(self, tokens: list[int]) -> None:
        """Appends tokens."""
        for token in tokens:
            place = len(self.tokens)
            self._before_last = self._newest.get(token, -1)
            self._newest[token] = place
            before = -1
            if place:
                pair = (self.tokens[-1], token)
                before = self._newest_pair.get(pair, -1)
                self._newest_pair[pair] = place
            self._pair_before.append(before)
            self.tokens.append(token)

    def match(self, longest: int = LONGEST_MATCH) -> tuple[int, int]:
        """The place behind the best earlier occurrence of the end, and how many tokens match.

        Args:
            longest: tokens that are compared at most.

        Returns:
            `(0, 0)` where the last token is new.
        """
        if longest > 1 and self.tokens and self._pair_before[-1] >= 0:
            return self._longest_match(longest)
        return (self._before_last + 1, 1) if self._before_last >= 0 else (0, 0)

    def _longest_match(self, longest: int) -> tuple[int, int]:
        tokens, end = self.tokens, len(self.tokens) - 1
        best, place = (0, 0), self._pair_before[-1]
        for _ in range(MOST_PLACES):
            most = min(longest, place + 1)
            length = 2
            while length < most and tokens[place - length] == tokens[end - length]:
                length += 1
            if length > best[1]:
                best = place + 1, length
            place = self._pair_before[place]
            if place < 0 or best[1] == longest:
                break
        return best

    def following(self, start: int, count: int) -> list[int]:
        """`count` tokens from `start` on; where they reach the end, they go on with themselves, as
        a text that repeats itself does."""
        period = len(self.tokens) - start
        return [self.tokens[start + i % period] for i in range(count)]


class LookupGenerator(SteeredGenerator):
    """Candidates for `prompt_lookup_num_tokens`; further arguments as `SteeredGenerator`.

    Args:
        longest: tokens of a match that count.
        logits_processor: those of `generate`. Candidates end before a token that one of them
            forbids where it may be unable to judge what follows.
        vocabulary: tokens that scores are for.
    """

    def __init__(
        self,
        steering: Steering,
        *,
        longest: int,
        logits_processor: LogitsProcessorList,
        vocabulary: int,
        **common: Any,
    ) -> None:
        super().__init__(steering, **common)
        self._index = SuffixIndex()
        self._longest = longest
        self._processors: Any = without_harmless(logits_processor)
        self._vocabulary = vocabulary

    def _draft(self, input_ids: torch.Tensor, limit: int) -> list[int]:
        index = self._index
        index.extend(input_ids[0, len(index.tokens) :].tolist())
        start, length = index.match(self._longest)
        if not length:
            self._drafter = ""
            return []
        # A long match promises more than a short one, so each kind has an acceptance of its own.
        self._drafter = "lookup of 1" if length == 1 else f"lookup of {2 if length < 4 else 4}+"
        count = self.steering.draft_steps(input_ids, limit, self._drafter)
        return self._allowed(input_ids, index.following(start, count))

    def _allowed(self, input_ids: torch.Tensor, drafts: list[int]) -> list[int]:
        for i, token in enumerate(drafts):
            if token in self._eos:
                return drafts[:i]
            if self._processors:
                new = input_ids.new_tensor([drafts[:i]])
                sequence = torch.cat((input_ids, new), dim=1)
                if forbids(self._processors, sequence, token, self._vocabulary):
                    return drafts[:i]
        return drafts
