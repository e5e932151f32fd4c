"""One call of `generate`: whether it speculates, and who makes its drafts.

Promises that what transformers refuses stays refused, and that candidates which are not ours to
make (other tokenizers, early exit, heads of the model itself) stay transformers' own.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel, TextStreamer
from transformers.generation import GenerationMode
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)

from bmc_core.log import log_once
from bmc_transformers.cache import BMCCache
from bmc_transformers.speculation.draft_model import Doubts, DraftModelGenerator
from bmc_transformers.speculation.lookup import LONGEST_MATCH, LookupGenerator
from bmc_transformers.speculation.settings import Speculation
from bmc_transformers.speculation.steering import SteeredGenerator

logger = logging.getLogger("bmc_transformers")

LOOKUP_TOKENS = 16
"""Draft tokens of a round at most where `generate` is given neither assistant nor lookup."""

MakeCache = Callable[[PreTrainedModel, int, int], BMCCache | None]
"""A model, rows of the prompt, rows at the end -> its empty cache; None: it cannot have one."""

_GENERATE = inspect.signature(GenerationMixin.generate)
_GET_CANDIDATE_GENERATOR = inspect.signature(GenerationMixin._get_candidate_generator)

# What a forward of the assistant gets from us, or what says nothing about its rows.
_TEXT_ONLY = frozenset(
    (
        "attention_mask",
        "cache_position",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)
# Arguments of `generate` under which another way of decoding might show, or costs too much.
_NOT_WITH_LOOKUP = (
    *("assistant_model", "assistant_tokenizer", "custom_generate", "inputs_embeds"),
    *("logits_processor", "negative_prompt_attention_mask", "negative_prompt_ids"),
    *("past_key_values", "prefix_allowed_tokens_fn", "stopping_criteria", "synced_gpus"),
)
# The same for settings of the generation config; their values that change nothing beside them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "cache_implementation": (None,),
    "guidance_scale": (None, 1, 1.0),
    "is_assistant": (None, False),
    "num_return_sequences": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "prefill_chunk_size": (None,),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "use_cache": (None, True),
    "watermarking_config": (None,),
}

_current: ContextVar[Call | None] = ContextVar("bmc_transformers_call", default=None)


class Call:
    """A running `generate`.

    Attributes:
        draft_tokens: that a step verifies at most, by what the assistant is set to.
        generator: who makes the drafts, if it is one of ours.
    """

    def __init__(self, assistant: Any) -> None:
        self.draft_tokens = assistant_tokens(assistant)
        self.generator: SteeredGenerator | None = None


def current_call() -> Call | None:
    """The innermost `generate` of an enabled model that runs in this thread."""
    return _current.get()


@contextmanager
def running(call: Call) -> Iterator[None]:
    """Makes it the current call; one that raises leaves no unverified rows in a cache of the
    user's."""
    token = _current.set(call)
    try:
        yield
    except BaseException:
        if call.generator is not None:
            call.generator.drop_unverified()
        raise
    finally:
        _current.reset(token)
        if call.generator is not None:
            call.generator.steering.close()


def assistant_tokens(assistant: Any) -> int:
    """Draft tokens of a round that transformers reads from an assistant; 0 where it is none."""
    if not isinstance(assistant, PreTrainedModel):
        return 0
    config: Any = assistant.generation_config
    tokens = config.num_assistant_tokens
    if tokens is None:
        tokens = config._get_default_generation_params()["num_assistant_tokens"]
    return int(tokens)


def with_lookup(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The arguments of `generate`, by name, with prompt lookup; None: this call does without.

    Only where nobody can tell but by the clock: greedy search for one sequence of text, without
    stopping criteria or processors of the user's.
    """
    given = _GENERATE.bind(model, *args, **kwargs).arguments
    given = {**given.pop("kwargs", {}), **given}
    del given["self"]
    if not _can_assist(model) or any(given.get(name) is not None for name in _NOT_WITH_LOOKUP):
        return None
    if not isinstance(given.get("streamer"), TextStreamer | None):
        return None
    config = given.get("generation_config")
    settings = {k: v for k, v in given.items() if k not in _GENERATE.parameters}
    settings = {k: v for k, v in settings.items() if k not in ("tokenizer", "trust_remote_code")}
    merged, inputs = model._prepare_generation_config(config, **settings)
    if not _is_plain_greedy(merged) or set(inputs) - _TEXT_ONLY - {"input_ids"}:
        return None
    ids = given.get("inputs")
    ids = given.get("input_ids") if ids is None else ids
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[0] == 0:
        return None
    if ids.shape[0] > 1:
        log_once(
            logger,
            'bmc_transformers: speculate="auto" does nothing for batches of several sequences: '
            "transformers verifies the drafts of one",
        )
        return None
    if config is None:
        return given | {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    config = copy.deepcopy(config)
    config.prompt_lookup_num_tokens = LOOKUP_TOKENS
    return given | {"generation_config": config}


def _can_assist(model: PreTrainedModel) -> bool:
    """Whether the model decodes as transformers does, and its steps can be taken back."""
    kind = type(model)
    stock = ("_sample", "_assisted_decoding", "_get_candidate_generator")
    return (
        all(getattr(kind, name) is getattr(GenerationMixin, name) for name in stock)
        and not getattr(model, "_is_stateful", False)
        and getattr(model, "_supported_generation_modes", None) is None
    )


def _is_plain_greedy(config: Any) -> bool:
    return config.get_generation_mode() == GenerationMode.GREEDY_SEARCH and all(
        getattr(config, name, None) in values for name, values in _NEUTRAL.items()
    )


def candidate_generator(
    model: PreTrainedModel,
    speculation: Speculation,
    stock: Callable[..., CandidateGenerator],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    make_cache: MakeCache,
) -> CandidateGenerator:
    """What transformers would make with these arguments, or ours in its place.

    Args:
        stock: the model's own `_get_candidate_generator`.

    Raises:
        ValueError: more than one sequence.
    """
    bound = _GET_CANDIDATE_GENERATOR.bind(model, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    batch = given["input_ids"].shape[0]
    setting = _setting(given)
    if batch > 1 and setting is not None:
        raise ValueError(
            f"{setting} with a batch of {batch} sequences: allowed is one sequence "
            "(batch_size = 1), transformers verifies no more"
        )
    made = stock(*args, **kwargs)
    ours: SteeredGenerator | str = f"{type(made).__name__} is none that BMC knows"
    if type(made) is PromptLookupCandidateGenerator:
        ours = _lookup(model, speculation, made, given)
    elif type(made) is AssistedCandidateGenerator:
        ours = _draft_model(model, speculation, made, given, make_cache)
    if isinstance(ours, str):
        log_once(logger, f"bmc_transformers: the drafts stay transformers' own, because {ours}")
        return made
    call = _current.get()
    if call is not None:
        call.generator = ours
    return ours


def _setting(given: Mapping[str, Any]) -> str | None:
    """The argument that asked for drafts of these two kinds, as the user knows it."""
    tokens, assistant = (
        given["generation_config"].prompt_lookup_num_tokens,
        given["assistant_model"],
    )
    if tokens is not None:
        return f"prompt_lookup_num_tokens={tokens}"
    return None if assistant is None else f"assistant_model={type(assistant).__name__}"


def _common(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    config = given["generation_config"]
    eos = config._eos_token_tensor
    return {
        "max_length": config.max_length,
        "eos": frozenset(() if eos is None else eos.flatten().tolist()),
        "model_cache": given["model_kwargs"].get("past_key_values"),
        "logits_processor": given["logits_processor"],
    }


def _lookup(
    model: PreTrainedModel,
    speculation: Speculation,
    stock: PromptLookupCandidateGenerator,
    given: Mapping[str, Any],
) -> SteeredGenerator:
    return LookupGenerator(
        speculation.steering(model, None, stock.num_output_tokens),
        **_common(model, given),
        longest=given["generation_config"].max_matching_ngram_size or LONGEST_MATCH,
        vocabulary=model.config.get_text_config().vocab_size,
    )


def _draft_model(
    model: PreTrainedModel,
    speculation: Speculation,
    stock: AssistedCandidateGenerator,
    given: Mapping[str, Any],
    make_cache: MakeCache,
) -> SteeredGenerator | str:
    """The generator, or why there is none."""
    config, ids = given["generation_config"], given["input_ids"]
    inputs = {k: v for k, v in given["model_kwargs"].items() if v is not None}
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if others := sorted(set(inputs) - _TEXT_ONLY):
        return f"the model is also given {', '.join(others)}"
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        return "assistant_ensemble_weight needs the probabilities of the drafts"
    if any(t is not None and t.shape != ids.shape for t in (mask, positions)):
        return "mask or positions are of more tokens than generate was given"
    assistant: Any = stock.assistant_model
    cache = make_cache(assistant, ids.shape[1], config.max_length)
    if cache is None:
        return f"a {type(assistant).__name__} cannot have a BMCCache"
    device = assistant.device
    return DraftModelGenerator(
        speculation.steering(model, assistant, int(stock.num_assistant_tokens)),
        **_common(model, given),
        assistant=assistant,
        cache=cache,
        attention_mask=None if mask is None else mask.to(device),
        position_ids=None if positions is None else positions.to(device),
        confidence=stock.assistant_confidence_threshold or 0.0,
        doubts=Doubts(always=speculation.setting == "fixed"),
    )
