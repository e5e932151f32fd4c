"""One greedy generation of a small random Llama with a given cache, timed token by token.

Promises the seconds of every decode step, so that a generation of N rows also tells what its first
rows took. Knows nothing of which policy is best.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerationConfig

from benchmarks.lib.llama import LlamaShape, RandomLlama, drawn_tokens
from bmc_core.kv_store import RowsStore
from bmc_core.kv_store.base import rows_to_hold
from bmc_core.policy import BMCPolicy
from bmc_transformers import BMCCache, register_attention
from bmc_transformers.layers import BMCLayer

ATTENTIONS = ("padded", "sdpa", "native")
"""How a step attends: torch's sdpa over every row that is held, with a mask (the paper's scheme);
torch's sdpa over views of the valid rows; the native kernel over packed rows."""


SHAPE = LlamaShape("growth", 4, 128, 8, 8, 64, intermediate=256, vocabulary=512, dtype="float32")
"""A Llama whose K and V weigh much beside its weights."""


class Generated(NamedTuple):
    """`step_seconds[i]`: until row P + i was written and the next token known. `tokens`: `[batch,
    steps + 1]`. `growths`: of one layer, after the prompt; the copied rows likewise."""

    step_seconds: list[float]
    tokens: torch.Tensor
    growths: int


class ZeroPaddedStore(RowsStore):
    """Spare rows are zero: whoever attends over them, masked, gets no NaN out of them."""

    def _resized(
        self, tensor: torch.Tensor, capacity: int, dropped: int, dense: bool
    ) -> torch.Tensor:
        resized = super()._resized(tensor, capacity, dropped, dense)
        kept = self.length - dropped
        resized.narrow(2, kept, capacity - kept).zero_()
        return resized


class PaddedLayer(BMCLayer):
    """Hands out every row that is held; transformers' mask covers the spare ones."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        store = self.store
        if store is None or store.length == 0:
            return query_length, 0
        needed = store.length + query_length
        return rows_to_hold(store.policy, store.capacity, needed, store.limit), 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = self.get_seq_length() == 0
        views = super().update(key_states, value_states, *args, **kwargs)
        if prompt or not isinstance(self.store, RowsStore):
            return views
        return self.store._tensors()


class PaddedCache(BMCCache):
    """The paper's scheme: the same growing store, attended over with its padding.

    Without the mask, sdpa would attend to the spare rows; being "compileable" makes transformers
    build it for every step (nothing is compiled on a CPU).
    """

    is_compileable = True  # type: ignore[assignment]

    def __init__(self, config: Any, policy: BMCPolicy, *, max_length: int | None = None) -> None:
        super().__init__(config, policy, max_length=max_length)
        make = self._stores

        class Stores:
            """The cache's policy, limit and counters, in padded stores."""

            def layout(self, key: torch.Tensor, value: torch.Tensor) -> str:
                return "rows"

            def make(self, key: torch.Tensor, value: torch.Tensor) -> RowsStore:
                return ZeroPaddedStore(make.policy, limit=make.limit, counters=make.counters)

        self.layers = [PaddedLayer(Stores()) for _ in self.layers]


class _Clock(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Generator:
    """The model, and prompts of any length."""

    def __init__(self, shape: LlamaShape, batch_size: int, most_rows: int) -> None:
        register_attention()
        self.model: Any = RandomLlama(shape, most_rows + 1).module
        self.config = self.model.config
        self.batch_size = batch_size
        self._prompts = drawn_tokens(shape.vocabulary, batch_size, most_rows)

    def generate(
        self,
        attention: str,
        policy: BMCPolicy | None,
        prompt_rows: int,
        new_rows: int,
        limit: int | None,
    ) -> Generated:
        """Greedy tokens for `new_rows` decode steps after a prompt.

        Args:
            attention: one of `ATTENTIONS`.
            policy: of the cache; None: transformers' own cache, for comparing the tokens.
            limit: rows that the cache is told to expect at most.
        """
        self.model.set_attn_implementation("bmc" if attention == "native" else "sdpa")
        cache = None
        if policy is not None:
            make = PaddedCache if attention == "padded" else BMCCache
            cache = make(self.model.config, policy, max_length=limit)
        clock = _Clock()
        prompt = self._prompts[:, :prompt_rows]
        settings = GenerationConfig(max_new_tokens=new_rows + 1, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            tokens = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=settings,
                past_key_values=cache,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        seconds = [after - before for before, after in itertools.pairwise(clock.times)]
        growths = 0 if cache is None else cache.stats().growths // len(cache.layers) - 1
        return Generated(seconds, tokens[:, prompt_rows:], growths)
