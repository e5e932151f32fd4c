"""Hugging Face generation with draft tokens, and DeepSpeed around it: their own caches, and BMC's.

Promises that all speculators of a run compute with the same weight tensors, and that each turn
begins with the same K and V of the prompt, computed once by the model itself and copied into a new
cache: transformers would run the prompt anew in every call, assisted generation also where it is
given a cache. Knows nothing of other frameworks.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.engines.speculating.base import (
    AUTO,
    DEFAULT,
    FIXED,
    NONE,
    Length,
    Setup,
    Speculator,
    Turn,
)
from benchmarks.engines.transformers import twin
from benchmarks.lib.chain import ChainLlama
from bmc_core.machine import openmp

LOOKUP_TOKENS = 2
"""Longest n-gram of prompt lookup, transformers' default."""
PREFILL_ROWS = 512
TITLES = {
    "dynamic": "transformers",
    "bmc": "BMC in transformers",
    "deepspeed": "DeepSpeed",
    "bmc_deepspeed": "BMC in DeepSpeed",
}
Rows = list[tuple[torch.Tensor, torch.Tensor]]
"""Key and value `[1, KV heads, rows, head size]` of every layer."""


class _Rounds(StoppingCriteria):
    """Stops after `new` tokens, and keeps the clock: it is asked once a forward."""

    def __init__(self, model: torch.nn.Module, prompt_rows: int, new: int) -> None:
        self._rows, self._new = prompt_rows, new
        self._hooks = (
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        )
        self._forwards: list[tuple[int, float]] = []  # rows, seconds
        self._rounds: list[tuple[int, float]] = []  # tokens so far, when

    def _begin(self, module: Any, inputs: Any, settings: dict[str, Any]) -> None:
        self._given = settings["input_ids"].shape[1]
        self._start = time.perf_counter()

    def _end(self, module: Any, inputs: Any, output: Any) -> None:
        self._forwards.append((self._given, time.perf_counter() - self._start))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens = input_ids.shape[1] - self._rows
        self._rounds.append((tokens, time.perf_counter()))
        return torch.tensor([tokens >= self._new])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def turn(self, output: list[int]) -> Turn:
        """All but the first round, in which the draft reads the prompt."""
        (first, start), (last, end) = self._rounds[0], self._rounds[-1]
        turn = Turn(end - start, last - first, len(self._rounds) - 1, [output])
        counts = [tokens for tokens, _ in self._rounds]
        for rows, before, after in zip(self._forwards[1:], counts, counts[1:], strict=False):
            proposed, accepted = rows[0] - 1, after - before - 1
            turn.drafted_for += proposed > 0
            turn.proposed += proposed
            turn.examined += min(accepted + 1, proposed)
            turn.accepted += accepted
            turn.forward_seconds += rows[1]
        turn.drafting_seconds = turn.seconds - turn.forward_seconds
        turn.draft_steps = turn.proposed
        return turn


_MODULES: weakref.WeakKeyDictionary[ChainLlama, dict[tuple[int, ...], Rows]] = (
    weakref.WeakKeyDictionary()
)


def prompt_rows(model: ChainLlama, prompt: Sequence[int]) -> Rows:
    """K and V of all but the last token, as the model computes them; the same object every time."""
    known = _MODULES.setdefault(model, {})
    key = tuple(prompt[:-1])
    if key not in known:
        cache = DynamicCache(config=model.module.config)
        tokens = torch.tensor([key])
        with torch.inference_mode():
            for part in tokens.split(PREFILL_ROWS, 1):
                model.module(
                    input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
        layers: Any = cache.layers
        known[key] = [(layer.keys, layer.values) for layer in layers]
    return known[key]


class HuggingFace(Speculator):
    """transformers' `generate`, with its own cache or BMC's.

    Args:
        name: "dynamic", "bmc", "deepspeed" or "bmc_deepspeed".
        mode: `NONE`, `FIXED`, `DEFAULT` (the assistant's own settings) or, with BMC, `AUTO`.
        r: rows per growth of BMC's cache.
    """

    def __init__(self, name: str, mode: str, r: int = 128) -> None:
        self.name, self.mode, self.title = name, mode, TITLES[name]
        self.peer = not name.startswith("bmc")
        if self.peer and mode == AUTO:
            raise ValueError(f"mode={mode!r} with {name}; allowed: bmc, bmc_deepspeed")
        self._r = r
        self._model: Any = None

    def start(self, setup: Setup) -> None:
        assert isinstance(setup.target, ChainLlama)
        self._setup, self._chain = setup, setup.target
        self._draft = twin(setup.draft.module) if isinstance(setup.draft, ChainLlama) else None
        self._model = self._loaded(twin(self._chain.module))
        module = self._module
        self._prepare = module._prepare_cache_for_generation
        module._prepare_cache_for_generation = MethodType(functools.partial(_filled, self), module)
        module.prepare_inputs_for_generation = _sliced(module.prepare_inputs_for_generation)
        self.threads = torch.get_num_threads()
        self.openmp = openmp.serving() or ", ".join(openmp.runtimes())

    @property
    def _module(self) -> Any:
        return self._model.module if "deepspeed" in self.name else self._model

    def _loaded(self, model: LlamaForCausalLM) -> Any:
        """What `generate` is called on."""
        steered: dict[str, Any] = {"speculate": self.mode} if self.mode in (AUTO, FIXED) else {}
        if "deepspeed" not in self.name:
            if self.peer:
                return model
            from bmc_transformers import enable

            return enable(model, self._r, **steered)
        import deepspeed

        settings: dict[str, Any] = {
            "dtype": model.dtype,
            "max_out_tokens": self._setup.rows + self._setup.new + 64,
        }
        if not self.peer:
            import bmc_deepspeed  # noqa: F401 - makes kv_policy known

            settings |= {"kv_policy": "bmc", "kv_policy_config": {"r": self._r, **steered}}
        return deepspeed.init_inference(model, **settings)

    def turn(self, prompts: Sequence[Sequence[int]], new: int, length: Length) -> Turn:
        (prompt,) = prompts
        self.prompt = prompt_rows(self._chain, prompt)
        rounds = _Rounds(self._module, len(prompt), new)
        tokens = torch.tensor([list(prompt)])
        try:
            out = self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=new + self._setup.max_draft_tokens + 20,
                stopping_criteria=StoppingCriteriaList([rounds]),
                **self._drafting(length),
            )
        finally:
            rounds.close()
        return rounds.turn(out[0, len(prompt) :][:new].tolist())

    def _drafting(self, length: Length) -> dict[str, Any]:
        """Arguments of `generate`; an assistant's settings are in its own configuration."""
        if length == NONE:
            return {}
        number = length if isinstance(length, int) else self._setup.max_draft_tokens
        if self._draft is None:
            return {
                "prompt_lookup_num_tokens": number,
                "max_matching_ngram_size": LOOKUP_TOKENS,
            }
        config = GenerationConfig.from_model_config(self._draft.config)
        if length != DEFAULT:
            config.num_assistant_tokens = number
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = 0.0
        self._draft.generation_config = config
        return {"assistant_model": self._draft}

    def start_bytes(self, setup: Setup) -> int:
        """A cache, and the other one that growing it takes; weights are shared."""
        return 3 * (setup.rows + setup.new + 256) * setup.row_bytes

    def close(self) -> None:
        self._model = self._draft = None


def _filled(speculator: HuggingFace, model: Any, *arguments: Any, **settings: Any) -> Any:
    """Makes the cache as `generate` would, and puts the prompt's rows in."""
    found = speculator._prepare(*arguments, **settings)
    model_kwargs = settings.get("model_kwargs", arguments[1] if len(arguments) > 1 else None)
    assert model_kwargs is not None
    cache = model_kwargs["past_key_values"]
    for layer, (key, value) in enumerate(speculator.prompt):
        cache.update(key, value, layer)
    return found


def _sliced(prepare: Any) -> Any:
    """`prepare_inputs_for_generation` that leaves out what the cache holds, in the first round of
    assisted generation too."""

    @functools.wraps(prepare)
    def prepared(input_ids: torch.Tensor, next_sequence_length: int | None = None, **given: Any):
        cache = given.get("past_key_values")
        if next_sequence_length is None and cache is not None:
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        return prepare(input_ids, next_sequence_length=next_sequence_length, **given)

    return prepared
