"""The worker of `vllm.py` beside it: one vLLM engine that continues prompts with draft tokens.

The engine runs in this process, so that a step is timed without another process in between. Knows
nothing of the engine that it is compared with, and nothing of BMC but its settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Clock:
    """Sums the seconds of a method's calls, in place of that method."""

    def __init__(self, owner: Any, name: str) -> None:
        self._method: Callable[..., Any] = getattr(owner, name)
        self.reset()
        setattr(owner, name, self)

    def reset(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._method(*arguments, **settings)
        finally:
            self.seconds += time.perf_counter() - start
            self.calls += 1


class Drafts:
    """What became of draft tokens, counted where the scheduler tells its statistics."""

    def __init__(self, scheduler: Any) -> None:
        self._told = scheduler.make_spec_decoding_stats
        self._schedule = scheduler.schedule
        self.reset()
        scheduler.make_spec_decoding_stats = self.tell
        scheduler.schedule = self.schedule

    def reset(self) -> None:
        self.drafted_for = self.proposed = self.examined = self.accepted = self.steps = 0

    def tell(self, *arguments: Any, **counts: Any) -> Any:
        proposed, accepted = counts["num_draft_tokens"], counts["num_accepted_tokens"]
        if proposed:
            self.drafted_for += 1
            self.proposed += proposed
            self.examined += min(accepted + 1, proposed)
            self.accepted += accepted
        return self._told(*arguments, **counts)

    def schedule(self, *arguments: Any, **settings: Any) -> Any:
        """Counts the steps that the drafter is asked for."""
        found = self._schedule(*arguments, **settings)
        if found.total_num_scheduled_tokens:
            self.steps += found.num_spec_tokens_to_schedule or 0
        return found


class Worker:
    """One target with its draft, and one batch of prompts at a time."""

    def start(
        self,
        model: str,
        dtype: Any,
        backend: str,
        batch: int,
        rows: int,
        pool_bytes: int,
        speculative: dict[str, Any] | None,
        additional: dict[str, Any],
    ) -> dict[str, Any]:
        """Builds the engine for `batch` sequences of at most `rows` rows."""
        import torch
        from vllm import LLM

        from bmc_core.machine import openmp

        self.llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=rows,
            max_num_seqs=batch,
            max_num_batched_tokens=max(4096, 64 * batch),
            kv_cache_memory_bytes=pool_bytes,
            enable_prefix_caching=True,
            attention_backend=backend,
            speculative_config=speculative,
            additional_config=additional,
            disable_log_stats=True,
            seed=0,
        )
        self.engine = self.llm.llm_engine
        core: Any = self.engine.engine_core
        self.scheduler = core.engine_core.scheduler
        self.speculates = speculative is not None
        self.batch = batch
        runner = core.engine_core.model_executor.driver_worker.worker.model_runner
        self.forwards = Clock(runner, "_model_forward")
        self.drafting = Clock(runner, "propose_draft_token_ids")
        self.drafts = Drafts(self.scheduler)
        context = runner.vllm_config.compilation_config.static_forward_context
        layers = [layer for layer in context.values() if hasattr(layer, "impl")]
        return {
            "threads": torch.get_num_threads(),
            "openmp": openmp.serving() or ", ".join(openmp.runtimes()),
            "backends": sorted({layer.attn_backend.get_name() for layer in layers}),
        }

    def _steps(self, done: Callable[[], bool]) -> None:
        while not done():
            outputs: list[Any] = self.engine.step()
            for output in outputs:
                self.tokens[output.request_id] = list(output.outputs[0].token_ids)

    def turn(self, prompts: list[list[int]], new: int, length: int | None) -> dict[str, Any]:
        """Continues prompts until each has `new` tokens; timed once each has its first. All run
        until then, so that the batch stays as large as it is.

        Args:
            length: most draft tokens of a step, as a table by batch size has it; None: as the
                engine was started.
        """
        from vllm import SamplingParams

        if length is not None:
            # Longer by one: a table has an entry for each number of requests, and none of them.
            self.scheduler.dynamic_sd_lookup = [length] * (self.batch + 1)
        parameters = SamplingParams(
            temperature=0, max_tokens=2 * new + 64, ignore_eos=True, detokenize=False
        )
        self.tokens: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            self.engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        self._steps(lambda: len(self.tokens) == len(prompts))
        for counter in (self.forwards, self.drafting, self.drafts):
            counter.reset()
        before = sum(map(len, self.tokens.values()))
        start = time.perf_counter()
        self._steps(lambda: min(map(len, self.tokens.values())) >= new)
        seconds = time.perf_counter() - start
        tokens = sum(map(len, self.tokens.values())) - before
        found = self._counted()
        self.engine.abort_request(list(self.tokens))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        outputs = [self.tokens[str(number)][:new] for number in range(len(prompts))]
        return {"seconds": seconds, "tokens": tokens, "outputs": outputs, **found}

    def _counted(self) -> dict[str, Any]:
        drafts = self.drafts
        return {
            "steps": self.forwards.calls,
            "forward_seconds": self.forwards.seconds,
            "drafted_for": drafts.drafted_for,
            "proposed": drafts.proposed,
            "examined": drafts.examined,
            "accepted": drafts.accepted,
            "drafting_seconds": self.drafting.seconds,
            "draft_steps": drafts.steps if self.speculates else 0,
        }
