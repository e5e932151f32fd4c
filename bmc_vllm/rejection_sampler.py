"""vLLM's rejection sampler, reading the logits as they are and no more of them than it must.

Promises vLLM's outputs in vLLM's form, and that a request's tokens are those that it would have
without draft tokens: greedy ones exactly, drawn ones in distribution, and for a `seed` exactly
where drafts come without probabilities. A step without draft tokens takes the plain sampler. What
native code does not do (synthetic acceptance, double-precision noise, processors of others) takes
vLLM's own path. Knows nothing of how draft tokens were made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import (
    GREEDY_TEMPERATURE,
    PLACEHOLDER_TOKEN_ID,
    RejectionSampler,
)
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from bmc_core.attention import DTYPES
from bmc_core.sampling import Drafts, RequestSettings, keep_top, verify
from bmc_vllm.topk_topp_sampler import generator_seeds, row_seeds


class BMCRejectionSampler(RejectionSampler):
    """See the module docstring."""

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        if metadata.max_spec_len == 0:
            return self.sampler(logits=logits, sampling_metadata=sampling_metadata)
        if not self._takes(draft_probs, logits, sampling_metadata):
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        num_logprobs = sampling_metadata.max_num_logprobs
        settings = _settings(sampling_metadata)
        values = self._processed(metadata, logits, sampling_metadata)
        if num_logprobs is not None and self.is_processed_logprobs_mode:
            values = logits.to(torch.float32, copy=True) if values is None else values
            settings = _apply_settings(values, metadata, sampling_metadata)
        tokens = _verify(
            logits if values is None else values, metadata, draft_probs, settings, sampling_metadata
        )
        logprobs = None
        if num_logprobs is not None:
            shown = values if self.is_processed_logprobs_mode else logits
            assert shown is not None
            logprobs = self._get_logprobs_tensors(
                num_logprobs,
                metadata,
                logits,
                shown[metadata.target_logits_indices],
                shown[metadata.bonus_logits_indices],
                tokens,
            )
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    def _takes(
        self,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> bool:
        return (
            not self.synthetic_mode
            and not getattr(self, "use_fp64_gumbel", False)
            and logits.is_cpu
            and logits.dtype in DTYPES
            and (draft_probs is None or draft_probs.shape[1] == logits.shape[1])
            and not _active(sampling_metadata.logitsprocs.argmax_invariant)
        )

    def _processed(
        self,
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> torch.Tensor | None:
        """The logits after penalties and all that forbids tokens; None where nothing does."""
        processors = _active(sampling_metadata.logitsprocs.non_argmax_invariant)
        min_tokens = [one for one in processors if isinstance(one, MinTokensLogitsProcessor)]
        others = [one for one in processors if not isinstance(one, MinTokensLogitsProcessor)]
        holder = getattr(sampling_metadata, "thinking_budget_state_holder", None)
        by_vllm = (
            bool(others)
            or not sampling_metadata.no_penalties
            or bool(sampling_metadata.bad_words_token_ids)
            or sampling_metadata.allowed_token_ids_mask is not None
            or (holder is not None and holder.has_tracked_requests())
        )
        if not by_vllm and not min_tokens:
            return None
        values = logits.to(torch.float32, copy=True)
        if by_vllm:
            without = replace(sampling_metadata, logitsprocs=LogitsProcessors(others))
            bonus, target = metadata.bonus_logits_indices, metadata.target_logits_indices
            # In vLLM's order: the bonus rows' call brings the thinking budgets up to date.
            values[bonus] = self.sampler.apply_logits_processors(values[bonus], without, True)
            values[target] = self.apply_logits_processors(values[target], without, metadata)
        # Over all rows of a request: vLLM's call for bonus rows does not count the draft tokens
        # before them.
        rows = [count + 1 for count in metadata.num_draft_tokens]
        for one in min_tokens:
            values = one.apply_with_spec_decode(values, rows)
        return values


def _active(processors: Iterable[Any]) -> list[Any]:
    """Processors that change something in this step; those of others always may."""

    def idle(processor: Any) -> bool:
        return (
            (isinstance(processor, MinTokensLogitsProcessor) and not processor.min_toks)
            or (isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases)
            or (isinstance(processor, MinPLogitsProcessor) and not processor.min_p_count)
        )

    return [processor for processor in processors if not idle(processor)]


def _settings(sampling_metadata: SamplingMetadata) -> RequestSettings:
    if sampling_metadata.all_greedy:
        return RequestSettings(None)
    top_k = sampling_metadata.top_k
    return RequestSettings(
        sampling_metadata.temperature,
        None if top_k is None else top_k.to(torch.int32),
        sampling_metadata.top_p,
    )


def _apply_settings(
    values: torch.Tensor, metadata: SpecDecodeMetadata, sampling_metadata: SamplingMetadata
) -> RequestSettings:
    """Temperature, top-k and top-p in place, for whom the logits are shown after them; what is left
    to ask of each request."""
    temperature, top_k, top_p = _settings(sampling_metadata)
    if temperature is None:
        return RequestSettings(None)
    # vLLM's rows lie request by request, the bonus row last.
    counts = torch.tensor(metadata.num_draft_tokens) + 1
    greedy = temperature == GREEDY_TEMPERATURE
    values.div_(temperature.masked_fill(greedy, 1.0).repeat_interleave(counts).unsqueeze(1))
    if top_k is not None or top_p is not None:
        keep_top(
            values,
            None if top_k is None else top_k.repeat_interleave(counts),
            None if top_p is None else top_p.repeat_interleave(counts),
        )
    return RequestSettings((~greedy).to(torch.float32))


def _verify(
    values: torch.Tensor,
    metadata: SpecDecodeMetadata,
    draft_probs: torch.Tensor | None,
    settings: RequestSettings,
    sampling_metadata: SamplingMetadata,
) -> torch.Tensor:
    drafts = Drafts(
        metadata.draft_token_ids.to(torch.int32),
        metadata.cu_num_draft_tokens.to(torch.int32),
        metadata.target_logits_indices.to(torch.int32),
        metadata.bonus_logits_indices.to(torch.int32),
        metadata.max_spec_len,
        draft_probs,
    )
    if settings.temperature is None:
        return verify(values, settings, drafts, None)
    draws = _Draws(metadata.num_draft_tokens, sampling_metadata.generators)
    tokens = verify(values, settings, drafts, draws.seeds)
    draws.give_back(tokens)
    return tokens


class _Before(NamedTuple):
    """A generator, and its state before the step."""

    generator: torch.Generator
    state: torch.Tensor


class _Draws:
    """The seeds of a step's rows, one of a request's generator for each token that it gets.

    So that a `seed` gives the same tokens whatever was drafted and accepted.
    """

    def __init__(self, counts: list[int], generators: dict[int, torch.Generator]) -> None:
        self._counts = counts
        self._before = {
            request: _Before(generator, generator.get_state())
            for request, generator in generators.items()
            if counts[request]
        }
        self.seeds = row_seeds([count + 1 for count in counts], generators)

    def give_back(self, tokens: torch.Tensor) -> None:
        """Sets generators back that gave more seeds than their requests got tokens."""
        if not self._before:
            return
        used = (tokens != PLACEHOLDER_TOKEN_ID).sum(dim=1).tolist()
        for request, before in self._before.items():
            if used[request] <= self._counts[request]:
                before.generator.set_state(before.state)
                generator_seeds(before.generator, used[request])
