"""Greedy float32 tokens with BMC are CPU_ATTN's, whatever the engine does with the requests."""

import pytest

from tests.support.engines import (
    Tokens,
    engine,
    flush,
    free_blocks,
    generate,
    prompts_of,
    scheduler,
    worker,
)
from tests.support.models import ModelStore

LENGTHS = (1, 31, 32, 33, 127, 128, 129, 300)
PREFIX = prompts_of([160], seed=5)[0]
SHARED = [PREFIX + tail for tail in prompts_of([1, 20, 40], seed=6)]
MIXED = prompts_of(LENGTHS)
GROWING = prompts_of([30, 33, 36, 39, 42, 45, 48, 51], seed=9)
BMC = {"bmc": {"r": 128}}

_stock: dict[tuple[str, str], list[Tokens]] = {}


def stock_tokens(model_dir: ModelStore, model: str, key: str) -> list[Tokens]:
    """CPU_ATTN's tokens for each set of prompts, from one plain engine per model."""
    if (model, key) not in _stock:
        with engine(model_dir(model), "CPU_ATTN") as llm:
            _stock[model, "mixed"] = generate(llm, MIXED)
            _stock[model, "shared"] = generate(llm, SHARED)
            _stock[model, "growing"] = generate(llm, GROWING, max_tokens=110)
    return _stock[model, key]


@pytest.mark.parametrize("model", ["llama-mha", "llama-gqa"])
def test_batch_chunked_prefill_prefix_and_abort(model_dir: ModelStore, model: str) -> None:
    mixed = stock_tokens(model_dir, model, "mixed")
    shared = stock_tokens(model_dir, model, "shared")
    # 64 tokens per step: prompts above that are prefilled in chunks, beside decodes.
    with engine(
        model_dir(model), "BMC", max_num_batched_tokens=64, max_num_seqs=8, additional_config=BMC
    ) as llm:
        assert type(scheduler(llm)).__name__ == "BMCScheduler"
        assert type(worker(llm)).__name__ == "BMCWorker"
        all_free = free_blocks(llm)
        assert generate(llm, MIXED) == mixed
        assert generate(llm, SHARED[:1]) == shared[:1]
        assert generate(llm, SHARED) == shared
        # Aborted requests give their blocks back; the others do not notice.
        got = generate(llm, MIXED, abort_after={7: 3, 2: 10})
        assert [t for i, t in enumerate(got) if i not in (2, 7)] == [
            t for i, t in enumerate(mixed) if i not in (2, 7)
        ]
        flush(llm)
        assert free_blocks(llm) == all_free
        assert scheduler(llm).growth_stats().rows_reserved == 0


def test_prefix_cache_is_hit(model_dir: ModelStore) -> None:
    with engine(model_dir("llama-gqa"), "BMC", additional_config=BMC) as llm:
        manager = scheduler(llm).kv_cache_manager
        generate(llm, SHARED[:1], max_tokens=4)
        calls = []
        original = manager.get_computed_blocks
        manager.get_computed_blocks = lambda r: calls.append(original(r)) or calls[-1]
        generate(llm, SHARED[1:], max_tokens=4)
        # 160 shared tokens, blocks of 32 rows: all five are found.
        assert [hit for _, hit, _ in calls] == [160, 160]


@pytest.mark.parametrize("model", ["llama-gqa", "gemma2"])
def test_preemption_in_a_tiny_pool(model_dir: ModelStore, model: str) -> None:
    """Requests outgrow the pool together: spare blocks must not stand in anybody's way."""
    expected = stock_tokens(model_dir, model, "growing")
    with engine(
        model_dir(model),
        "BMC",
        # One request of max_model_len fits, and not much more.
        num_gpu_blocks_override=20 if model == "llama-gqa" else 28,
        max_num_batched_tokens=128,
        max_num_seqs=8,
        max_model_len=256,
        additional_config=BMC,
    ) as llm:
        preempted = []
        preempt = scheduler(llm)._preempt_request

        def record(request, *args, **kwargs):
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        scheduler(llm)._preempt_request = record
        assert generate(llm, GROWING, max_tokens=110) == expected
        assert preempted
        flush(llm)


@pytest.mark.parametrize("model", ["mistral-window", "gemma2", "bloom-alibi", "gpt-oss-sinks"])
def test_attention_kinds(model_dir: ModelStore, model: str) -> None:
    mixed = stock_tokens(model_dir, model, "mixed")
    shared = stock_tokens(model_dir, model, "shared")
    with engine(
        model_dir(model), "BMC", max_num_batched_tokens=64, max_num_seqs=8, additional_config=BMC
    ) as llm:
        assert generate(llm, MIXED) == mixed
        assert generate(llm, SHARED) == shared
        assert generate(llm, SHARED) == shared
        assert scheduler(llm).growth_stats().growths > 0


def test_up_to_max_model_len(model_dir: ModelStore) -> None:
    """The last growth is cut at the length of the block table."""
    prompts = prompts_of([500, 100])
    settings = {"max_model_len": 505}
    with engine(model_dir("llama-gqa"), "CPU_ATTN", **settings) as llm:
        expected = generate(llm, prompts, max_tokens=405)
    with engine(
        model_dir("llama-gqa"), "BMC", additional_config={"bmc": {"r": 192}}, **settings
    ) as llm:
        assert generate(llm, prompts, max_tokens=405) == expected


@pytest.mark.parametrize(
    "compilation_config",
    [
        # Dynamo traces, nothing is lowered: the graph around our ops.
        {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"},
        # What `vllm serve` does by default.
        {},
    ],
    ids=["traced", "inductor"],
)
def test_compiled(model_dir: ModelStore, compilation_config: dict) -> None:
    expected = stock_tokens(model_dir, "llama-gqa", "mixed")
    with engine(
        model_dir("llama-gqa"),
        "BMC",
        enforce_eager=False,
        compilation_config=compilation_config,
        additional_config=BMC,
    ) as llm:
        config = llm.llm_engine.vllm_config.compilation_config
        assert config.backend == compilation_config.get("backend", "inductor")
        assert generate(llm, MIXED) == expected
