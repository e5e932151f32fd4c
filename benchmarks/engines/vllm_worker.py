"""The worker of `engines/vllm.py`: one vLLM engine, stepped by request.

The engine runs in this process, so that a step is timed without another process in between. Knows
nothing of the engine that it is compared with.
"""

from __future__ import annotations

import time
from typing import Any

TABLE_ROWS = 16384
"""Distinct rows of drawn keys and values."""


class Worker:
    """One model, one batch."""

    def start(
        self,
        model: str,
        backend: str,
        batch: int,
        rows: int,
        steps: int,
        pool_bytes: int,
        compile: bool,
        vocabulary: int,
    ) -> dict[str, Any]:
        """Builds the engine and adds the requests."""
        import torch
        from vllm import LLM, SamplingParams

        self.torch = torch
        self.batch = batch
        llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=not compile,
            max_model_len=rows + steps + 16,
            max_num_seqs=batch,
            max_num_batched_tokens=8192,
            kv_cache_memory_bytes=pool_bytes,
            enable_prefix_caching=False,
            attention_backend=backend,
            disable_log_stats=True,
            seed=0,
        )
        self.engine = llm.llm_engine
        core: Any = self.engine.engine_core
        self.runner = core.engine_core.model_executor.driver_worker.worker.model_runner
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, vocabulary, (batch, rows), generator=generator).tolist()
        parameters = SamplingParams(
            temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False
        )
        for number, prompt in enumerate(prompts):
            self.engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        self.tokens: dict[str, list[int]] = {}
        layers = self._layers()
        backends = {type(layer.impl).__name__ for layer in layers.values()}
        return {"threads": torch.get_num_threads(), "backends": sorted(backends)}

    def _layers(self) -> dict[str, Any]:
        """Attention layers by name."""
        context = self.runner.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if hasattr(layer, "impl")}

    def fill(self, drawn: bool) -> dict[str, Any]:
        """Runs the prompts through; with `drawn` the model is not run: its layers' keys and
        values are drawn instead, the same in every process, and written as the layers would.
        """
        model = self.runner.model
        if drawn:
            model.forward = self._drawn_forward(model)
        start = time.perf_counter()
        try:
            while len(self.tokens) < self.batch:
                self._step()
        finally:
            if drawn:
                del model.forward
        return {"seconds": time.perf_counter() - start}

    def _drawn_forward(self, model: Any) -> Any:
        torch = self.torch
        layers = self._layers()
        first = next(iter(layers.values()))
        generator = torch.Generator().manual_seed(1)
        shape = (TABLE_ROWS, first.num_kv_heads, first.head_size)
        tables = [torch.randn(*shape, generator=generator).to(torch.bfloat16) for _ in range(2)]

        def forward(input_ids: Any, positions: Any, *_: Any, **__: Any) -> Any:
            for number, name in enumerate(layers):
                rows = (positions * 7919 + input_ids * 31 + number * 104729) % TABLE_ROWS
                key, value = (table.index_select(0, rows) for table in tables)
                torch.ops.vllm.unified_kv_cache_update(key, value, name)
            return model.embed_input_ids(input_ids)

        return forward

    def _step(self) -> float:
        """Seconds of one step of the engine."""
        start = time.perf_counter()
        outputs: list[Any] = self.engine.step()
        seconds = time.perf_counter() - start
        for output in outputs:
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)
        return seconds

    def _decode(self) -> float:
        """One step in which every sequence gets a token."""
        before = sum(map(len, self.tokens.values()))
        seconds = self._step()
        new = sum(map(len, self.tokens.values())) - before
        if new != self.batch:
            raise RuntimeError(
                f"a decode step gave {new} tokens to {self.batch} sequences: the KV pool is "
                "too small or the requests have ended"
            )
        return seconds

    def check(self, path: str) -> dict[str, Any]:
        """One decode step; its logits, `[batch, vocabulary]` float32, are written to `path`."""
        torch = self.torch
        model, seen = self.runner.model, []
        compute = model.compute_logits

        def remember(*arguments: Any, **settings: Any) -> Any:
            logits = compute(*arguments, **settings)
            seen.append(logits.detach().float().clone())
            return logits

        model.compute_logits = remember
        try:
            self._decode()
        finally:
            del model.compute_logits
        order = [int(request.split("-")[0]) for request in self.runner.input_batch.req_ids]
        logits = torch.empty_like(seen[-1])
        logits[torch.tensor(order)] = seen[-1]
        torch.save(logits, path)
        return {"finite": bool(torch.isfinite(logits).all())}

    def steps(self, count: int) -> dict[str, Any]:
        """`count` timed decode steps after one that only wakes the threads."""
        self._decode()
        return {"seconds": [self._decode() for _ in range(count)]}

    def result(self) -> dict[str, Any]:
        """Tokens of every sequence."""
        return {"tokens": [self.tokens[str(number)] for number in range(self.batch)]}
