"""The worker of `engines/vllm.py`: one vLLM engine, stepped by request.

The engine runs in this process, so that a step is timed without another process in between. Knows
nothing of the engine that it is compared with.
"""

from __future__ import annotations

import time
from typing import Any


class Worker:
    """One model, and one batch at a time."""

    def start(
        self,
        model: str,
        dtype: Any,
        backend: str,
        batch: int,
        rows: int,
        pool_bytes: int,
        compile: bool,
    ) -> dict[str, Any]:
        """Builds the engine for `batch` sequences of at most `rows` rows."""
        import torch
        from vllm import LLM

        self.torch = torch
        self.llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=not compile,
            max_model_len=rows + 16,
            max_num_seqs=batch,
            max_num_batched_tokens=max(8192, batch),
            kv_cache_memory_bytes=pool_bytes,
            enable_prefix_caching=True,
            attention_backend=backend,
            disable_log_stats=True,
            seed=0,
        )
        self.engine = self.llm.llm_engine
        core: Any = self.engine.engine_core
        self.runner = core.engine_core.model_executor.driver_worker.worker.model_runner
        self.tokens: dict[str, list[int]] = {}
        backends = {layer.attn_backend.get_name() for layer in self._layers().values()}
        return {"threads": torch.get_num_threads(), "backends": sorted(backends)}

    def _layers(self) -> dict[str, Any]:
        """Attention layers by name."""
        context = self.runner.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if hasattr(layer, "impl")}

    def _abort(self) -> None:
        """Ends the requests of an earlier batch."""
        self.engine.abort_request(list(self.tokens))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.tokens = {}

    def wear(self, turnovers: int) -> dict[str, Any]:
        """Block tables as of a server that has served mixed requests for long. The model does not
        run: the scheduler is answered with drawn tokens."""
        from benchmarks.lib.load import Load
        from benchmarks.lib.served import Served, wear

        self._abort()
        core: Any = self.engine.engine_core
        scheduler = core.engine_core.scheduler
        config = self.engine.vllm_config
        rows = scheduler.kv_cache_config.num_blocks * config.cache_config.block_size
        load = Load("worn", config.scheduler_config.max_num_seqs, rows)
        load = load.within(config.model_config.max_model_len)
        wear(Served(scheduler, core.engine_core.request_block_hasher), load, turnovers)
        return {}

    def empty(self) -> dict[str, Any]:
        """Ends the batch."""
        self._abort()
        return {}

    def fill(self, batch: int, rows: int, new: int, drawn: bool) -> dict[str, Any]:
        """Requests of drawn tokens, run through; with `drawn` the model is not run: its layers'
        keys and values are drawn instead, the same in every process, and written as the layers
        would."""
        from vllm import SamplingParams

        from benchmarks.lib.llama import drawn_tokens

        self._abort()
        self.batch = batch
        model = self.runner.model
        vocabulary = self.runner.model_config.get_vocab_size()
        parameters = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        for number, prompt in enumerate(drawn_tokens(vocabulary, batch, rows).tolist()):
            self.engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        if drawn:
            model.forward = self._drawn_forward(model)
        try:
            while len(self.tokens) < batch:
                self._step()
        finally:
            if drawn:
                del model.forward
        return {}

    def _drawn_forward(self, model: Any) -> Any:
        from benchmarks.lib.llama import DrawnRows

        layers = self._layers()
        first = next(iter(layers.values()))
        table = DrawnRows(first.num_kv_heads, first.head_size, self.runner.model_config.dtype)
        update = self.torch.ops.vllm.unified_kv_cache_update

        def forward(input_ids: Any, positions: Any, *_: Any, **__: Any) -> Any:
            for number, name in enumerate(layers):
                update(*table.rows(number, positions, input_ids), name)
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

    def logits(self, path: str) -> dict[str, Any]:
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
        return {}

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of `count` decode steps."""
        return {"seconds": [self._decode() for _ in range(count)]}

    def result(self) -> dict[str, Any]:
        """Tokens of every sequence."""
        return {"tokens": [self.tokens[str(number)] for number in range(self.batch)]}

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Greedily, as a user calls it."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._abort()
        parameters = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            parameters,
            use_tqdm=False,
        )
        found = [list(output.outputs[0].token_ids) for output in outputs]
        return {"tokens": [[*p, *new] for p, new in zip(prompts, found, strict=True)]}
