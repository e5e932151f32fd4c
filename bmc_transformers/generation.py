"""`enable` and `disable`: every `generate` of a model uses a BMCCache, and no longer does.

`enable` puts three methods on the model object, not on its class: `_prepare_cache_for_generation`,
so that the cache which `generate` would make is a BMCCache, `generate`, so that an assistant model
given to it gets one too, and `_get_candidate_generator`, so that speculation is ours where it is
asked for. `disable` takes away exactly what `enable` put there.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal, TypeVar

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from bmc_core.log import log_once
from bmc_core.policy import BMCPolicy, GrowthPolicy
from bmc_transformers import attention as bmc_attention
from bmc_transformers import linears
from bmc_transformers.auto_policy import policy_for
from bmc_transformers.cache import BMCCache, PolicyLike, unsupported_layer_types
from bmc_transformers.implementations import (
    Implementations,
    for_decoder,
    implementations,
    restore,
)
from bmc_transformers.speculation import Speculation, SpeculationStats
from bmc_transformers.speculation.calls import (
    Call,
    candidate_generator,
    current_call,
    running,
    with_lookup,
)
from bmc_transformers.speculation.settings import Speculate

logger = logging.getLogger("bmc_transformers")

Attention = Literal["bmc", "stock"]
Model = TypeVar("Model", bound=PreTrainedModel)

_STATE = "_bmc"
# Among the positional arguments after `self`.
_ASSISTANT_POSITION = (
    list(inspect.signature(GenerationMixin.generate).parameters).index("assistant_model") - 1
)


@dataclass
class _Enabled:
    """What `enable` was told, and what was there before."""

    policy: GrowthPolicy
    attention: Attention
    speculation: Speculation | None = None
    previous_methods: dict[str, Any] = field(default_factory=dict)
    previous_attention: Implementations = field(default_factory=list)


def enable(
    model: Model,
    policy: PolicyLike = "auto",
    *,
    attention: Attention | None = None,
    pack_linears: bool = False,
    speculate: Speculate | None = None,
) -> Model:
    """Makes every `generate` of this model use a BMCCache; called again, it changes the settings.

    `generate` behaves as before where it is given `past_key_values`, `cache_implementation` or
    `use_cache=False`.

    Args:
        model: a decoder-only transformers model. Changed in place.
        policy: a `BMCPolicy`, an int r, or "auto" (chosen for each `generate` by what this machine
            was measured to do).
        attention: "bmc": the native kernel, CPU only. "stock": the model's attention stays as it
            is. None: "bmc" where model and device allow it.
        pack_linears: also pack the weights of linear layers for oneDNN (see `linears`).
        speculate: "auto": before each step it is decided how many draft tokens pay, 0 among them,
            up to the assistant's `num_assistant_tokens` or `prompt_lookup_num_tokens`; greedy
            search for one sequence looks drafts up in the text where `generate` is told neither.
            "fixed": always as many as `generate` is told. None: speculation is transformers' own,
            over the BMCCache. The text is the model's own in any case.

    Returns:
        The model.

    Raises:
        TypeError: not a model with `generate`, or a setting of the wrong type.
        ValueError: a model whose cache is not K and V of a decoder, or a setting that this model
            cannot have.

        After these and any other error the model is as before, an earlier `enable` included.
    """
    _check_model(model)
    settings = _Enabled(
        BMCPolicy.parse(policy),
        _choose_attention(model, attention),
        _choose_speculation(model, speculate),
    )
    if not isinstance(pack_linears, bool):
        raise TypeError(f"pack_linears={pack_linears!r}: allowed are True and False")
    before = vars(model).get(_STATE)
    implementations_before = implementations(model)
    was_packed = any(type(module) is linears.PackedLinear for module in model.modules())
    if before is None:
        _put_methods(model, settings)
    else:
        settings.previous_methods = before.previous_methods
        settings.previous_attention = before.previous_attention
    vars(model)[_STATE] = settings
    try:
        _set_attention(model, settings)
        _set_linears(model, pack_linears)
    except BaseException:
        if before is None:
            disable(model)
        else:
            vars(model)[_STATE] = before
            for config, implementation in implementations_before:
                config._attn_implementation_internal = implementation
            _set_linears(model, was_packed)
        raise
    return model


def disable(model: Model) -> Model:
    """Undoes `enable`: methods, attention implementation and weights are as they were before.

    A model that is not enabled stays as it is. Returns the model.

    Raises:
        TypeError: not a model at all.
    """
    _check_module(model)
    settings = vars(model).pop(_STATE, None)
    if settings is None:
        return model
    for name, previous in settings.previous_methods.items():
        if previous is None:
            vars(model).pop(name, None)
        else:
            vars(model)[name] = previous
    _restore_attention(settings)
    linears.unpack_linears(model)
    return model


def is_enabled(model: torch.nn.Module) -> bool:
    """Whether `enable` was called for this model object.

    Raises:
        TypeError: not a model at all.
    """
    _check_module(model)
    return _STATE in vars(model)


def speculation_stats(model: torch.nn.Module) -> SpeculationStats | None:
    """What speculation did since `enable(model, speculate=...)`; None: it was not asked for.

    Raises:
        TypeError: not a model at all.
    """
    settings = vars(model)[_STATE] if is_enabled(model) else None
    return None if settings is None or settings.speculation is None else settings.speculation.stats


def _check_module(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model={model!r} is a {type(model).__name__}; allowed: the model that enable was given"
        )


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise TypeError(f"model is a {name}; allowed: a transformers model with generate()")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model {name} is an encoder-decoder; allowed: decoder-only models")
    if not model._supports_default_dynamic_cache() or "mamba" in name.lower():  # type: ignore[misc]
        raise ValueError(f"model {name} has a cache of its own kind; allowed: K and V per layer")
    unsupported = unsupported_layer_types(model.config)
    if unsupported:
        raise ValueError(
            f"model {name} has layers of type {', '.join(unsupported)}, which hold more than K and "
            "V; allowed: full, sliding or chunked attention"
        )


def _choose_attention(model: PreTrainedModel, attention: str | None) -> Attention:
    name = type(model).__name__
    if attention not in (None, "bmc", "stock"):
        raise ValueError(f'attention={attention!r}: allowed are "bmc", "stock" and None')
    if attention == "stock":
        return "stock"
    reason = None
    if not model._can_set_attn_implementation():
        reason = f"{name} has no attention interface"
    elif model.device.type != "cpu":
        reason = f"{name} is on {model.device}, and the native kernel is for the CPU"
    if reason is None:
        return "bmc"
    if attention == "bmc":
        raise ValueError(f'attention="bmc": {reason}; allowed: "stock" or None')
    log_once(logger, f"bmc_transformers: cache without the native kernel, because {reason}")
    return "stock"


def _choose_speculation(model: PreTrainedModel, speculate: Any) -> Speculation | None:
    processes = getattr(model, "_tp_size", None) or 1
    if speculate == "auto" and processes > 1:
        raise ValueError(
            f'speculate="auto" with a model that is split over {processes} processes: each would '
            'choose by its own clock; allowed: "fixed" and None'
        )
    return None if speculate is None else Speculation(speculate)


def _put_methods(model: PreTrainedModel, settings: _Enabled) -> None:
    for name, function in (
        ("_prepare_cache_for_generation", _prepare_cache_for_generation),
        ("generate", _generate),
        ("_get_candidate_generator", _get_candidate_generator),
    ):
        settings.previous_methods[name] = vars(model).get(name)
        # A bound method, so that a deep copy of the model is bound to the copy.
        vars(model)[name] = MethodType(function, model)


def _previous(model: PreTrainedModel, name: str) -> Any:
    """The method as it was before `enable`."""
    previous = vars(model)[_STATE].previous_methods[name]
    return getattr(type(model), name).__get__(model) if previous is None else previous


def _prepare_cache_for_generation(
    self: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    given = model_kwargs.get("past_key_values")
    result = _previous(self, "_prepare_cache_for_generation")(
        generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    made = model_kwargs.get("past_key_values")
    if (
        given is not None
        or generation_config.cache_implementation is not None
        or type(made) is not DynamicCache
    ):
        return result
    settings = vars(self)[_STATE]
    assistant, call = bool(generation_config.is_assistant), current_call()
    # An assistant is asked for a few tokens at a time; how far it will get, it is not told.
    known = not assistant or getattr(settings.policy, "needs_limit", False)
    beams = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    cache = _new_cache(
        self,
        batch_size=batch_size * beams,
        prompt_rows=_prompt_rows(model_kwargs, generation_config),
        max_length=max_cache_length if known else None,
        draft_tokens=generation_config.prompt_lookup_num_tokens
        or (0 if assistant or call is None else call.draft_tokens),
    )
    if assistant:
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache
    return result


def _new_cache(
    model: PreTrainedModel,
    *,
    batch_size: int,
    prompt_rows: int,
    max_length: int | None,
    draft_tokens: int,
) -> BMCCache:
    """An empty cache by the settings of an enabled model."""
    settings = vars(model)[_STATE]
    policy = policy_for(
        model,
        settings.policy,
        batch_size=batch_size,
        prompt_rows=prompt_rows,
        total_rows=max_length,
        native=settings.attention == "bmc",
        draft_tokens=draft_tokens,
    )
    return BMCCache(model.config, policy, max_length=max_length)


def _draft_cache(assistant: PreTrainedModel, prompt_rows: int, max_length: int) -> BMCCache | None:
    """A cache for the assistant of a call; None: it was not enabled for it."""
    if not is_enabled(assistant):
        return None
    return _new_cache(
        assistant, batch_size=1, prompt_rows=prompt_rows, max_length=max_length, draft_tokens=0
    )


def _prompt_rows(model_kwargs: dict[str, Any], generation_config: Any) -> int:
    """Rows of the prompt, from whatever `generate` has prepared by now; 0: not known."""
    for name in ("attention_mask", "position_ids"):
        tensor = model_kwargs.get(name)
        if isinstance(tensor, torch.Tensor):
            return tensor.shape[-1]
    return getattr(generation_config, "_mask_length", None) or 0


@functools.wraps(GenerationMixin.generate)
def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    settings = vars(self)[_STATE]
    assistant = kwargs.get("assistant_model")
    if assistant is None and len(args) > _ASSISTANT_POSITION:
        assistant = args[_ASSISTANT_POSITION]
    _check_assistant(assistant)
    generate = _previous(self, "generate")
    with _assistant_enabled(assistant, settings), running(Call(assistant)):
        if settings.speculation is not None and settings.speculation.setting == "auto":
            arguments = with_lookup(self, args, kwargs)
            if arguments is not None:
                return generate(**arguments)
        return generate(*args, **kwargs)


def _get_candidate_generator(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    stock = _previous(self, "_get_candidate_generator")
    speculation = vars(self)[_STATE].speculation
    if speculation is None:
        return stock(*args, **kwargs)
    return candidate_generator(self, speculation, stock, args, kwargs, _draft_cache)


def _check_assistant(assistant: Any) -> None:
    """A wrapper around a model, such as DeepSpeed's engine, has no cache to be served."""
    inside = getattr(assistant, "module", None)
    if not isinstance(assistant, PreTrainedModel) and isinstance(inside, PreTrainedModel):
        raise TypeError(
            f"assistant_model is a {type(assistant).__name__}; allowed: the model in it, its "
            "attribute module (engine.module)"
        )


@contextmanager
def _assistant_enabled(assistant: Any, settings: _Enabled) -> Iterator[None]:
    """The assistant has the model's settings while `generate` runs, if it can and has none.

    With speculation of ours it also keeps its number of draft tokens, which transformers' own
    schedules write back.
    """
    if not isinstance(assistant, PreTrainedModel):
        yield
        return
    tokens = assistant.generation_config.num_assistant_tokens
    was_enabled = is_enabled(assistant)
    if not was_enabled:
        _try_to_enable(assistant, settings)
    try:
        yield
    finally:
        if not was_enabled:
            disable(assistant)
        if settings.speculation is not None:
            assistant.generation_config.num_assistant_tokens = tokens


def _try_to_enable(assistant: PreTrainedModel, settings: _Enabled) -> None:
    try:
        enable(
            assistant,
            settings.policy,
            attention=None if settings.attention == "bmc" else "stock",
        )
    except (TypeError, ValueError) as error:
        log_once(logger, f"bmc_transformers: the assistant keeps its own cache: {error}")


def _set_attention(model: PreTrainedModel, settings: _Enabled) -> None:
    if settings.attention == "stock":
        _restore_attention(settings)
        return
    bmc_attention.register_attention()
    if not settings.previous_attention:
        settings.previous_attention = implementations(model)
    model.set_attn_implementation(for_decoder(model, bmc_attention.NAME))


def _set_linears(model: PreTrainedModel, pack: bool) -> None:
    if pack:
        linears.pack_linears(model)
    else:
        linears.unpack_linears(model)


def _restore_attention(settings: _Enabled) -> None:
    restore(settings.previous_attention, instead_of=bmc_attention.NAME)
    settings.previous_attention = []
