"""vLLM's features beside plain decoding: with BMC they give what they give with CPU_ATTN."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored, NullEventPublisher
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

from tests.support.engines import engine, flush, generate, prompts_of, scheduler, worker
from tests.support.models import ModelStore

PROMPTS = prompts_of([5, 40, 130, 200])


def backends(llm: LLM) -> dict[str, set[str]]:
    """Attention backends by the class of the layer's own implementation."""
    found: dict[str, set[str]] = {}
    for name, layer in worker(llm).compilation_config.static_forward_context.items():
        if hasattr(layer, "attn_backend"):
            found.setdefault(layer.attn_backend.get_name(), set()).add(name)
    return found


@pytest.mark.parametrize(
    ("model", "settings", "managers", "layout"),
    [
        # KV sharing: layers that read another layer's rows.
        ("gemma3n-shared-kv", {}, ["BMCSlidingWindow", "BMCFullAttention"], "LHBNC"),
        ("llama4-chunked", {}, ["ChunkedLocalAttention"] * 3 + ["BMCFullAttention"], "LHBNC"),
        # With prefix caching, CPU_ATTN's own tokens of this model are not those without.
        (
            "lfm2-hybrid",
            {"enable_prefix_caching": False},
            ["Mamba", "BMCFullAttention"],
            "LBHNC",
        ),
    ],
)
def test_kinds_of_layers(
    model_dir: ModelStore, model: str, settings: dict[str, Any], managers: list[str], layout: str
) -> None:
    tokens = {}
    for backend in ("CPU_ATTN", "BMC"):
        with engine(
            model_dir(model), backend, max_num_batched_tokens=128, max_num_seqs=8, **settings
        ) as llm:
            # The second time prefixes are in the cache.
            tokens[backend] = [generate(llm, PROMPTS, 24) for _ in range(2)]
            if backend == "BMC":
                assert set(backends(llm)) == {"BMC"}
                found = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
                assert [type(m).__name__.removesuffix("Manager") for m in found] == managers
                assert worker(llm).cache_config.kv_cache_layout == layout
                assert scheduler(llm).growth_stats().growths > 0
                flush(llm)
    assert tokens["BMC"] == tokens["CPU_ATTN"]
    assert all(len(set(answer)) > 8 for answer in tokens["BMC"][0])


def lora(folder: Path) -> LoRARequest:
    """An adapter of the attention projections that changes what the model says."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    config |= {"target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(2):
        for name, size in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(8, 128, generator=generator) / 10
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size, 8, generator=generator) / 10
    save_file(weights, folder / "adapter_model.safetensors")
    return LoRARequest("adapter", 1, str(folder))


def test_lora(model_dir: ModelStore, tmp_path: Path) -> None:
    """The adapter's rows and the model's own are never taken for one another."""
    adapter = lora(tmp_path / "adapter")
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    tokens = {}
    for backend in ("CPU_ATTN", "BMC"):
        with engine(
            model_dir("llama-gqa"), backend, enable_lora=True, max_lora_rank=8, max_loras=1
        ) as llm:
            tokens[backend] = [
                [
                    list(answer.outputs[0].token_ids)
                    for answer in llm.generate(prompts, params, use_tqdm=False, lora_request=which)
                ]
                for which in (adapter, None, adapter)
            ]
    assert tokens["BMC"] == tokens["CPU_ATTN"]
    adapted, plain, again = tokens["BMC"]
    assert adapted == again
    assert all(a != b for a, b in zip(adapted, plain, strict=True))


def test_embeddings(model_dir: ModelStore, tmp_path: Path) -> None:
    """A decoder as a pooling model: the same vectors within float32's rounding."""
    # vLLM's pooling wants a tokenizer, also for prompts of token ids.
    model = shutil.copytree(model_dir("llama-gqa"), tmp_path / "model")
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(model)
    vectors = {}
    for backend in ("CPU_ATTN", "BMC"):
        with engine(
            str(model), backend, runner="pooling", convert="embed", skip_tokenizer_init=False
        ) as llm:
            prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            answers = llm.embed(prompts, use_tqdm=False)
            assert set(backends(llm)) == {backend}
            vectors[backend] = torch.tensor([answer.outputs.embedding for answer in answers])
    torch.testing.assert_close(vectors["BMC"], vectors["CPU_ATTN"], rtol=1e-4, atol=1e-5)
    assert (vectors["BMC"][0] - vectors["BMC"][1]).abs().max() > 0.1


class _Collected(NullEventPublisher):
    def __init__(self) -> None:
        super().__init__(0)
        self.events: list[Any] = []

    def publish(self, events: Any) -> None:
        self.events += events.events


def test_kv_events_tell_what_is_cached(model_dir: ModelStore) -> None:
    """Growth evicts blocks beside the oldest one: each is announced as removed."""
    config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with engine(
        model_dir("llama-gqa"), "BMC", kv_events_config=config, num_gpu_blocks_override=40
    ) as llm:
        collected = scheduler(llm).kv_event_publisher = _Collected()
        for seed in range(4):
            generate(llm, prompts_of([100, 200, 300], seed=seed), 40)
        flush(llm)
        cached: set[Any] = set()
        removed = 0
        for event in collected.events:
            assert isinstance(event, (BlockStored, BlockRemoved))
            if isinstance(event, BlockStored):
                cached |= set(event.block_hashes)
            else:
                assert set(event.block_hashes) <= cached
                cached -= set(event.block_hashes)
                removed += len(event.block_hashes)
        hashes = [block.block_hash for block in scheduler(llm).kv_cache_manager.block_pool.blocks]
        assert removed > 39, "the pool was used through"
        assert cached == {maybe_convert_block_hash(get_block_hash(h)) for h in hashes if h}


@pytest.fixture
def without_gradients() -> Iterator[None]:
    # vLLM copies into parameters that want gradients; its servers run without.
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_change_in_place(
    model_dir: ModelStore, without_gradients: None, dtype: str
) -> None:
    """Attention sinks, which the layer keeps a copy of where the model's are not float32."""
    with engine(model_dir("gpt-oss-sinks"), "BMC", dtype=dtype) as llm:
        before = generate(llm, PROMPTS[:2], 8, logprobs=1)
        parameters = dict(worker(llm).get_model().named_parameters())
        sinks = {name: p for name, p in parameters.items() if name.endswith("sinks")}
        assert len(sinks) == 2
        changed = [(name, torch.full_like(p, 5.0)) for name, p in sinks.items()]
        original = [(name, p.clone()) for name, p in sinks.items()]
        answers = []
        for weights in (changed, original):
            llm.collective_rpc(
                "reload_weights",
                kwargs={"weights_iterator": iter(weights), "is_checkpoint_format": False},
            )
            assert llm.reset_prefix_cache()
            answers.append(generate(llm, PROMPTS[:2], 8, logprobs=1))
        assert answers[0] != before
        assert answers[1] == before


def test_the_second_model_runner_is_named(model_dir: ModelStore, vllm_log: list[str]) -> None:
    """It needs a Triton that works on CPUs, so that only the line can be tested."""
    with engine(model_dir("llama-gqa"), "BMC") as llm:
        assert not any("second model runner" in line for line in vllm_log)
        worker(llm).use_v2_model_runner = True
        worker(llm)._log_unusual()
    (line,) = [line for line in vllm_log if "second model runner" in line]
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in line
