"""Between vLLM's model runner and its drafter: parks it, lets it catch up, keeps it within limits.

Promises that drafts are vLLM's own drafter's, or copied from the request's text, and that
verification is untouched. Takes the place of methods of one runner object:

- `execute_model`: learns which requests ended, resumed or are new, before the step;
- `_input_fits_in_drafter`: near the model's limit the drafter runs fewer steps, where vLLM would
  give the whole batch draft tokens that are no drafts;
- `propose_draft_token_ids`: with no steps wanted a draft model does not run at all, and computes
  the rows that it missed when it comes back;
- `take_draft_token_ids`: says which drafter made which draft, where there are two.

How many steps are wanted is the scheduler's decision (`num_spec_tokens_to_schedule`), the same for
all ranks. Drafters with a fixed number of steps always run that.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from bmc_vllm.config import BMCConfig
from bmc_vllm.drafters.catch_up import catch_up
from bmc_vllm.drafters.lookup import draft_tokens
from bmc_vllm.drafters.rows import DraftRows, Span, StepRows
from bmc_vllm.speculative import (
    DRAFT_MODEL,
    NGRAM,
    SELF_LIMITING,
    has_fixed_length,
    runs_step_by_step,
)

DRAFTERS = "bmc_drafters"
"""Attribute of a DraftTokenIds where a configuration has two drafters: for each request the name
of the one that made its draft."""


class Drafting:
    """See the module docstring.

    Args:
        runner: vLLM's first model runner, with models loaded and KV caches in place.

    Attributes:
        rows: what a draft model has computed; None where the drafter is no draft model.
        steps: drafting steps of the last model step. 0: the drafter did not run.
        seconds: that they took, catching up left out.
        catch_up_seconds: that catching up took in the last model step.
        caught_up: rows that the draft model caught up on since the start.
    """

    def __init__(self, runner: Any, settings: BMCConfig) -> None:
        self.runner = runner
        config = runner.speculative_config
        self.stepwise = runs_step_by_step(config)
        self.most = config.num_speculative_tokens
        self.rows: DraftRows | None = None
        if config.method == DRAFT_MODEL:
            self.rows = DraftRows(runner.drafter.block_size)
        self.steps = 0
        self.seconds = 0.0
        self.catch_up_seconds = 0.0
        self.caught_up = 0
        self._fixed = has_fixed_length(config)
        self._self_limiting = config.method in SELF_LIMITING
        self._lookup = settings.prompt_lookup if config.method == DRAFT_MODEL else None
        self._names: list[str] = []
        self._room = 0
        self._fitted = True
        self._execute_model = runner.execute_model
        self._fits = runner._input_fits_in_drafter
        self._propose = runner.propose_draft_token_ids
        self._take = runner.take_draft_token_ids
        runner.execute_model = self.execute_model
        runner._input_fits_in_drafter = self.fits
        runner.propose_draft_token_ids = self.propose
        runner.take_draft_token_ids = self.take_draft_token_ids

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None:
            self.rows.forget(scheduler_output.finished_req_ids)
            self.rows.forget(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
            self.rows.forget(new.req_id for new in scheduler_output.scheduled_new_reqs)
        self.steps, self.seconds, self.catch_up_seconds = 0, 0.0, 0.0
        self._fitted, self._names = True, []
        return self._execute_model(scheduler_output, *args, **kwargs)

    def fits(self, common: CommonAttentionMetadata | None) -> bool:
        """Whether the drafter runs in this step: there is room for its first pass at least."""
        if common is None:
            self._fitted = False
            return False
        self._room = self.runner.effective_drafter_max_model_len - common.max_seq_len
        limits_itself = self.stepwise or self._self_limiting
        self._fitted = self._room >= 0 if limits_itself else self._fits(common)
        if not self._fitted and self.rows is not None:
            self.rows.missed(self._step(common))
        return self._fitted

    def propose(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: torch.Tensor | list[list[int]],
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        spec_decode_metadata: SpecDecodeMetadata | None,
        common_attn_metadata: CommonAttentionMetadata,
        slot_mappings: Any,
    ) -> list[list[int]] | torch.Tensor:
        """Drafts of one step; as the runner's method of this place."""
        steps = scheduler_output.num_spec_tokens_to_schedule
        if self.stepwise:
            steps = min(steps, self._room)
        elif self._fixed:
            steps = self.most

        def run() -> list[list[int]] | torch.Tensor:
            return self._run(
                steps,
                scheduler_output,
                sampled_token_ids,
                sampling_metadata,
                hidden_states,
                sample_hidden_states,
                aux_hidden_states,
                spec_decode_metadata,
                common_attn_metadata,
                slot_mappings,
            )

        if self.rows is None:
            return run()
        step = self._step(common_attn_metadata)
        copied = self._copied(sampled_token_ids)
        if steps == 0 or all(drafts is None or drafts for drafts in copied):
            self._park(self.rows, step, spec_decode_metadata, common_attn_metadata)
            drafted: list[list[int]] | torch.Tensor = torch.empty(
                len(step.ids), 0, dtype=torch.int64
            )
        else:
            self._catch_up(common_attn_metadata, self.rows.spans(step))
            self.rows.computed(step)
            drafted = run()
        return drafted if self._lookup is None else self._combined(drafted, copied)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """The drafts of the step, with `DRAFTERS` where there are two."""
        if not self._fitted:
            # vLLM's placeholder: a token 0 for each draft, to be verified like any other.
            self.runner._draft_token_ids = self.runner._draft_token_ids[:, :0]
        taken = self._take()
        if taken is not None and self._names:
            setattr(taken, DRAFTERS, self._names)
        return taken

    def _run(self, steps: int, scheduler_output: SchedulerOutput, *args: Any) -> Any:
        """vLLM's drafter, with `steps` in place of what the scheduler asked for."""
        asked = scheduler_output.num_spec_tokens_to_schedule
        scheduler_output.num_spec_tokens_to_schedule = steps
        start = time.perf_counter()
        try:
            return self._propose(scheduler_output, *args)
        finally:
            scheduler_output.num_spec_tokens_to_schedule = asked
            self.steps, self.seconds = steps, time.perf_counter() - start

    def _park(
        self,
        rows: DraftRows,
        step: StepRows,
        verified: SpecDecodeMetadata | None,
        common: CommonAttentionMetadata,
    ) -> None:
        """A step without the draft model, but for prompts: those would cost as much later, and all
        at once."""
        drafts = 0 if verified is None else np.asarray(verified.num_draft_tokens)
        prompts = np.flatnonzero(step.counts - drafts > 1).tolist()
        if not prompts:
            rows.missed(step)
            return
        missing = {span.place: span.start for span in rows.spans(step)}
        ends = (step.first + step.counts).tolist()
        firsts = step.first.tolist()
        self._catch_up(common, [Span(i, missing.get(i, firsts[i]), ends[i]) for i in prompts])
        rows.computed(step, prompts)
        rows.missed(step, sorted(set(range(len(step.ids))).difference(prompts)))

    def _catch_up(self, common: CommonAttentionMetadata, spans: list[Span]) -> None:
        if spans:
            start = time.perf_counter()
            self.caught_up += catch_up(self.runner, common, spans)
            self.catch_up_seconds += time.perf_counter() - start

    def _step(self, common: CommonAttentionMetadata) -> StepRows:
        batch = self.runner.input_batch
        count = batch.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].numpy()
        return StepRows(
            batch.req_ids,
            batch.num_computed_tokens_cpu[:count],
            np.diff(starts),
            common.block_table_tensor.numpy(),
        )

    def _copied(self, sampled: torch.Tensor | list[list[int]]) -> list[list[int] | None]:
        """Each request's draft from its own text, [] where nothing matches, None where no draft is
        wanted since its prompt is not finished."""
        batch = self.runner.input_batch
        discarded = self.runner.discard_request_mask.np[: batch.num_reqs].tolist()
        if self._lookup is None:
            return [None if is_discarded else [] for is_discarded in discarded]
        rows = sampled.tolist() if isinstance(sampled, torch.Tensor) else sampled
        found: list[list[int] | None] = []
        for index, (tokens, is_discarded) in enumerate(zip(rows, discarded, strict=True)):
            if is_discarded:
                found.append(None)
                continue
            # The step's own tokens are not in the batch yet.
            known = batch.token_ids_cpu[index, : batch.num_tokens_no_spec[index]]
            new = np.array([token for token in tokens if token >= 0], dtype=known.dtype)
            text = np.concatenate([known, new])
            count = min(self.most, self.runner.max_model_len - len(text) - 1)
            found.append(draft_tokens(text, count, *self._lookup))
        return found

    def _combined(
        self, drafted: torch.Tensor | list[list[int]], copied: list[list[int] | None]
    ) -> list[list[int]]:
        made = drafted.tolist() if isinstance(drafted, torch.Tensor) else drafted
        self._names = [NGRAM if drafts else DRAFT_MODEL for drafts in copied]
        return [mine or others for mine, others in zip(copied, made, strict=True)]
