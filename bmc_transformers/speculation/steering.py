"""Between one `generate` and the controller of draft lengths: asks it, and tells it what happened.

Promises that a generator below never proposes more tokens than may still be generated, and none
behind an end-of-sequence token. Knows nothing of how drafts are made.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import CandidateGenerator

from bmc_core.speculation import DraftRequest, SpeculationController, StepTimes
from bmc_transformers.cache import BMCCache

Calibrate = Callable[[torch.Tensor], None]

_calls = itertools.count()


@dataclass
class SpeculationStats:
    """What speculation did since `enable`, all calls of `generate` together.

    Attributes:
        rounds: forwards of the model, each with the prompt or one verified row and its drafts.
        parked_rounds: those without a draft token.
        draft_tokens: that were verified. `accepted_tokens`: of these.
    """

    rounds: int = 0
    parked_rounds: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Steering:
    """The draft lengths of one `generate`.

    Args:
        controller: shared by all calls with the same drafter, so that they learn from each other.
        lock: held while it is asked: calls may run in several threads.
        calibrate: called before the controller is asked the first time, with the tokens so far.
    """

    def __init__(
        self,
        controller: SpeculationController,
        stats: SpeculationStats,
        lock: threading.RLock,
        calibrate: Calibrate | None = None,
    ) -> None:
        self.stats = stats
        self._controller = controller
        self._lock = lock
        self._calibrate = calibrate
        self._call = next(_calls)
        self._drafters: set[str] = set()

    def draft_steps(self, input_ids: torch.Tensor, limit: int, drafter: str) -> int:
        """How many draft tokens to make for the next round, at most `limit`; 0: none."""
        if limit <= 0:
            return 0
        with self._lock:
            if self._calibrate is not None:
                calibrate, self._calibrate = self._calibrate, None
                calibrate(input_ids)
            request = self._request(input_ids.shape[1], limit, drafter)
            return min(limit, self._controller.draft_steps([request]))

    def verified(self, context_rows: int, available: int, drafter: str) -> int:
        """How many of the draft tokens at hand to verify."""
        with self._lock:
            request = self._request(context_rows, available, drafter)
            return self._controller.verified_lengths([request], [available])[0]

    def ended(
        self, drafter: str, context_rows: int, proposed: int, accepted: int, times: StepTimes | None
    ) -> None:
        """A round is over. `times`: None where it was no plain step, such as the prompt's."""
        with self._lock:
            self.stats.rounds += 1
            self.stats.parked_rounds += not proposed
            self.stats.draft_tokens += proposed
            self.stats.accepted_tokens += accepted
            if proposed:
                key = (self._call, drafter)
                self._controller.observe_acceptance(key, proposed, accepted, drafter)
            if times is not None:
                self._controller.observe_step([proposed], [context_rows], times)

    def close(self) -> None:
        """The call has ended, by whatever way."""
        with self._lock:
            for drafter in self._drafters:
                self._controller.forget((self._call, drafter))
            self._drafters.clear()

    def _request(self, context_rows: int, limit: int, drafter: str) -> DraftRequest:
        self._drafters.add(drafter)
        return DraftRequest((self._call, drafter), context_rows, limit, drafter)


class SteeredGenerator(CandidateGenerator):
    """What `generate` asks for candidates in each round. A subclass makes them in `_draft`.

    The drafts come without logits, as if they were certain: with `do_sample`, transformers then
    draws each position from the model's own distribution and keeps a draft that was drawn, so the
    text has exactly that distribution, whatever was drafted.

    Args:
        max_length: tokens of the whole sequence at the end.
        eos: tokens that end a sequence; they are never proposed.
        model_cache: of the model that verifies.
    """

    def __init__(
        self,
        steering: Steering,
        *,
        max_length: int,
        eos: frozenset[int],
        model_cache: Cache | None = None,
    ) -> None:
        self.steering = steering
        self._model_cache = model_cache
        self._verified_rows = 0
        self._note_verified_rows()
        self._max_length = max_length
        self._eos = eos
        self._drafter = ""
        self._context_rows = 0
        self._proposed = 0
        self._made = 0
        self._drafting = 0.0
        self._verifying_since: float | None = None
        self._is_first_round = True

    def _draft(self, input_ids: torch.Tensor, limit: int) -> list[int]:
        """At most `limit` tokens that may follow; sets `_drafter`, `_made` and `_drafting`."""
        raise NotImplementedError

    def get_candidates(  # type: ignore[override]  # no logits
        self, input_ids: torch.Tensor, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sequence so far `[1, length]` with the draft tokens behind it, and no logits."""
        self._note_verified_rows()
        self._context_rows = input_ids.shape[1]
        self._made, self._drafting = 0, 0.0
        drafts = self._draft(input_ids, self._max_length - input_ids.shape[1] - 1)
        if drafts:
            kept = self.steering.verified(input_ids.shape[1], len(drafts), self._drafter)
            drafts = drafts[:kept]
        self._proposed = len(drafts)
        candidates = input_ids
        if drafts:
            new = torch.tensor([drafts], dtype=input_ids.dtype, device=input_ids.device)
            candidates = torch.cat((input_ids, new), dim=1)
        self._verifying_since = perf_counter()
        return candidates, None

    def update_candidate_strategy(
        self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        """The round is verified: the first `num_matches` draft tokens were right."""
        now = perf_counter()
        self._note_verified_rows()
        times = None
        if not self._is_first_round and self._verifying_since is not None:
            forward = now - self._verifying_since
            times = StepTimes(forward, 0.0, self._drafting, self._made)
        self._is_first_round = False
        accepted = min(int(num_matches), self._proposed)
        self.steering.ended(self._drafter, self._context_rows, self._proposed, accepted, times)

    def drop_unverified(self) -> None:
        """After a round that was not finished: forgets the rows that it added to a BMCCache."""
        if isinstance(self._model_cache, BMCCache):
            self._model_cache.crop(min(0, self._verified_rows - self._model_cache.get_seq_length()))

    def _note_verified_rows(self) -> None:
        if self._model_cache is not None:
            self._verified_rows = self._model_cache.get_seq_length()
