"""vLLM's real scheduler, with ours, without a model: steps are drafted and accepted by the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from bmc_vllm.kv_cache_interface import to_bmc_spec
from tests.support.managers import BLOCK, KINDS, hasher

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 512,
    "vocab_size": 512,
}
SPEC = {
    "ngram": {"method": "ngram", "prompt_lookup_max": 3},
    # Nothing of the draft is loaded here but its configuration.
    "draft_model": {"method": "draft_model", "model": MODEL},
}


@lru_cache
def configuration(method: str | None, most: int, settings: str) -> tuple[VllmConfig, Any]:
    """A configuration, and the rest that a scheduler wants; made once."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        speculative: dict[str, Any] | None = None
        options = json.loads(settings)
        if method is not None:
            speculative = {**SPEC[method], "num_speculative_tokens": most}
            if "model" in speculative:
                speculative["model"] = folder
            speculative |= options.pop("speculative", {})
        bmc = {"r": 64, "draft_length": "fixed", **options.pop("bmc", {})}
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            attention_backend="BMC",
            block_size=BLOCK,
            additional_config={"bmc": bmc},
            **{"speculative_config": speculative, **options},
        ).create_engine_config()
    return config, StructuredOutputManager(config)


def make_scheduler(
    num_blocks: int,
    method: str | None = "ngram",
    most: int = 4,
    kind: str = "full",
    log_stats: bool = False,
    **settings: Any,
) -> Any:
    """A BMCScheduler over a pool of its own.

    Args:
        kind: of layers, see `tests.support.managers.KINDS`.
        method: of speculation; None: there is none.
        most: num_speculative_tokens.
        settings: of EngineArgs, and ``bmc`` and ``speculative`` for what else is set there.
    """
    config, structured = configuration(method, most, json.dumps(settings))
    config.cache_config.num_gpu_blocks = num_blocks
    make: Any = config.scheduler_config.get_scheduler_cls()
    scheduler: Scheduler = make(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec([f"layer{i}"], to_bmc_spec(spec))
                for i, spec in enumerate(KINDS[kind])
            ],
        ),
        structured_output_manager=structured,
        block_size=BLOCK,
        log_stats=log_stats,
    )
    return scheduler


def add(
    scheduler: Any, name: str, prompt: Sequence[int], max_tokens: int = 60, priority: int = 0
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    params.update_from_generation_config({}, None)
    request = Request(
        name, list(prompt), params, None, block_hasher=hasher, priority=priority, arrival_time=0.0
    )
    scheduler.add_request(request)
    return request


def abort(scheduler: Any, name: str) -> None:
    scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)


def sampled(
    scheduler: Any, output: SchedulerOutput, accept: Callable[[str, int], int]
) -> dict[str, list[int]]:
    """What a model gives: of k draft tokens as many as ``accept(request, k)``, and one more."""
    tokens = {}
    for name in output.num_scheduled_tokens:
        request = scheduler.requests[name]
        drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
        count = 0 if request.is_prefill_chunk else 1 + accept(name, drafts)
        tokens[name] = [(request.num_tokens + i) % 3 + 1 for i in range(count)]
    return tokens


def finish(
    scheduler: Any,
    output: SchedulerOutput,
    tokens: dict[str, list[int]],
    drafts: bool = True,
    **reported: Any,
) -> None:
    """The rest of a step: what was sampled, then K new drafts for everybody.

    Args:
        reported: attributes of the worker's answer.
    """
    names = list(output.num_scheduled_tokens)
    result = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[tokens[name] for name in names],
    )
    for name, value in reported.items():
        setattr(result, name, value)
    scheduler.update_from_output(output, result)
    if scheduler.num_spec_tokens and names and drafts:
        tokens_ = [[9] * output.num_spec_tokens_to_schedule for _ in names]
        scheduler.update_draft_token_ids(DraftTokenIds(names, tokens_))


def step(scheduler: Any, accept: Callable[[str, int], int] = lambda name, k: k) -> SchedulerOutput:
    output = scheduler.schedule()
    finish(scheduler, output, sampled(scheduler, output, accept))
    return output


def drafts_of(output: SchedulerOutput) -> dict[str, int]:
    return {name: len(tokens) for name, tokens in output.scheduled_spec_decode_tokens.items()}


def tables(scheduler: Any, name: str) -> list[list[int]]:
    """Ids of a request's blocks, by group."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return [[block.block_id for block in m.req_to_blocks.get(name, ())] for m in managers]


def table(scheduler: Any, name: str) -> list[int]:
    """Of a scheduler with one group."""
    (blocks,) = tables(scheduler, name)
    return blocks
