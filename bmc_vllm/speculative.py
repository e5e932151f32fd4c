"""Speculative decoding under BMC: which configurations run, in whose words the others are refused.

Promises that a configuration either runs as it was tested or stops the start with an error that
names the setting, its value and what is allowed. Knows nothing of how drafts are made or verified.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from bmc_core.log import log_once

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("vllm.bmc")

DRAFT_MODEL = "draft_model"
NGRAM = "ngram"
STEPWISE = frozenset({DRAFT_MODEL, "eagle", "eagle3", "mtp"})
"""One forward pass for each draft token: their number may change with every step."""
SELF_LIMITING = frozenset({NGRAM, "suffix"})
"""Draft no token beyond the model's limit, request by request."""
METHODS = (NGRAM, "suffix", DRAFT_MODEL, "eagle", "eagle3", "mtp", "medusa", "custom_class")

_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_REASONS = {
    "ngram_gpu": "it needs a GPU",
    "mlp_speculator": "vLLM's first model runner does not have it",
    "dflash": "not tested on CPUs",
    "dspark": "vLLM's first model runner does not have it",
    "extract_hidden_states": "it drafts nothing, and has not been tested",
}


def runs_step_by_step(speculative: SpeculativeConfig) -> bool:
    """Whether the number of draft tokens may differ from step to step, and each costs a pass."""
    return speculative.method in STEPWISE and not speculative.parallel_drafting


def has_fixed_length(speculative: SpeculativeConfig) -> bool:
    """Whether vLLM's drafter fails if it is asked for another number of draft tokens."""
    return speculative.parallel_drafting or speculative.method in ("medusa", "suffix")


def check(vllm_config: VllmConfig) -> None:
    """Raises ValueError for what does not run with BMC; chooses the model runner that has its
    hooks."""
    speculative = vllm_config.speculative_config
    _check_two_drafters(vllm_config)
    if speculative is None:
        return
    _check_method(speculative)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    tokens = speculative.num_speculative_tokens
    if model is speculative.target_model_config and tokens >= model.max_model_len:
        # vLLM's worker makes tables of so many columns, and may end without a word.
        raise ValueError(
            f"speculative_config: num_speculative_tokens={tokens} with "
            f"max_model_len={model.max_model_len}: no request has room for as many draft tokens; "
            f"allowed: 1 to {model.max_model_len - 1}; few are worth verifying, 8 of a draft model "
            "and 16 of n-gram are plenty"
        )
    if model is not None and model.is_hybrid:
        raise ValueError(
            f"speculative_config with the architecture {model.architecture!r}, which has layers "
            "with a state: vLLM cannot take rejected draft tokens out of it on CPUs; allowed: "
            "models with attention layers only"
        )
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size} with speculative_config: "
            "not tested with attention backend BMC; allowed: 1"
        )
    if parallel.data_parallel_size > 1 and model is not None and model.is_moe:
        raise ValueError(
            f"data_parallel_size={parallel.data_parallel_size} with speculative_config and a "
            "mixture of experts, whose ranks must draft in step: not tested with attention "
            "backend BMC; allowed: 1"
        )
    _use_first_runner(vllm_config)


def _check_method(speculative: SpeculativeConfig) -> None:
    method = speculative.method
    if method not in METHODS:
        reason = _REASONS.get(str(method), "not tested")
        raise ValueError(
            f"speculative_config: method={method!r}: {reason} with attention backend BMC; allowed: "
            f"{', '.join(METHODS)}"
        )
    if getattr(speculative, "enable_adaptive_verification", False):
        raise ValueError(
            "speculative_config: enable_adaptive_verification=True: vLLM has it for GPUs only; "
            "BMC's scheduler chooses the draft tokens of each request itself; allowed: False"
        )


def _check_two_drafters(vllm_config: VllmConfig) -> None:
    from bmc_vllm.config import KEY, BMCConfig

    lookup = BMCConfig.from_vllm_config(vllm_config).prompt_lookup
    if lookup is None:
        return
    speculative: Any = vllm_config.speculative_config
    name = f"additional_config[{KEY!r}]['prompt_lookup_max']={lookup[1]}"
    if speculative is None:
        raise ValueError(
            f"{name} without speculative_config: a second drafter beside a draft model; allowed: "
            f"with method {DRAFT_MODEL!r}. For copied drafts alone: "
            '--speculative-config \'{"method": "ngram", "num_speculative_tokens": 16, '
            f'"prompt_lookup_max": {lookup[1]}}}\''
        )
    if speculative.method != DRAFT_MODEL:
        raise ValueError(
            f"{name} with method={speculative.method!r}: a second drafter beside a draft model; "
            f"allowed: method {DRAFT_MODEL!r}"
        )
    if speculative.draft_sample_method != "greedy":
        raise ValueError(
            f"{name} with draft_sample_method={speculative.draft_sample_method!r}: copied tokens "
            "have no probabilities of a draft model; allowed: 'greedy'"
        )


def _use_first_runner(vllm_config: VllmConfig) -> None:
    """vLLM takes its second model runner by itself where a Triton for CPUs is installed."""
    from vllm import envs

    if envs.VLLM_USE_V2_MODEL_RUNNER:
        raise ValueError(
            f"{_RUNNER}=1 with speculative_config: attention backend BMC steers drafts in vLLM's "
            f"first model runner; allowed: {_RUNNER}=0, or unset"
        )
    if not vllm_config.use_v2_model_runner:
        return
    # Read by every process of this engine.
    os.environ[_RUNNER] = "0"
    if vllm_config.use_v2_model_runner:
        raise ValueError(
            "speculative_config with a setting that needs vLLM's second model runner "
            "(watermark_config, hisparse_config): attention backend BMC steers drafts in the "
            "first; allowed: one of the two settings"
        )
    log_once(
        logger,
        f"speculative_config: vLLM's first model runner is used, as with {_RUNNER}=0: attention "
        "backend BMC steers drafts there",
    )


def check_draft_layers(runner: Any, kv_cache_config: KVCacheConfig) -> None:
    """Raises ValueError where vLLM's drafter would fail at an assertion: its layers need one KV
    cache group."""
    names = getattr(getattr(runner, "drafter", None), "_draft_attn_layer_names", None)
    if not names:
        return
    groups = [g for g in kv_cache_config.kv_cache_groups if not names.isdisjoint(g.layer_names)]
    if len(groups) > 1:
        method = runner.speculative_config.method
        raise ValueError(
            f"speculative_config: method={method!r}: the draft's {len(names)} attention layers lie "
            f"in {len(groups)} KV cache groups, as where a model has layers of several kinds (full "
            "and sliding window attention), and vLLM's drafters read one; allowed: models whose "
            "layers are of one kind, or a method without attention layers ('ngram', 'suffix', "
            "'medusa')"
        )
