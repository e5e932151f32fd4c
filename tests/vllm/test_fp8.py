"""fp8 KV caches: closer to the unquantized model than CPU_ATTN's fp8 is.

The kernel itself is checked against a float32 reference over the dequantized cache in tests/core.
Here the whole engine is compared: how far the log-probabilities of first tokens move when the cache
is quantized. CPU_ATTN's codes differ from ours (it does not round to nearest), so its tokens are no
reference; its distance from the unquantized cache is.
"""

import pytest

from tests.support.engines import engine, generate, prompts_of, worker
from tests.support.models import ModelStore

PROMPTS = prompts_of((5, 17, 33, 64, 90, 128, 150, 200, 300, 400))


def first_logprobs(model: str, backend: str, kv_cache_dtype: str) -> list[dict[int, float]]:
    with engine(model, backend, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype) as llm:
        layers = worker(llm).compilation_config.static_forward_context.values()
        assert {layer.attn_backend.get_name() for layer in layers} == {backend}
        results = generate(llm, PROMPTS, max_tokens=2, logprobs=20)
    return [{t: entry.logprob for t, entry in steps[0].items()} for _, steps in results]


def distance(one: list[dict[int, float]], other: list[dict[int, float]]) -> float:
    """Mean absolute difference over the tokens that both list."""
    pairs = [(a[t], b[t]) for a, b in zip(one, other, strict=True) for t in a.keys() & b.keys()]
    assert len(pairs) > 100
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
def test_no_further_from_the_unquantized_cache_than_cpu_attn(
    model_dir: ModelStore, kv_cache_dtype: str
) -> None:
    model = model_dir("llama-gqa")
    plain = first_logprobs(model, "CPU_ATTN", "auto")
    ours = distance(first_logprobs(model, "BMC", kv_cache_dtype), plain)
    stock = distance(first_logprobs(model, "CPU_ATTN", kv_cache_dtype), plain)
    assert 0 < ours <= stock


SCALES = {"_k_scale": 0.37, "_v_scale": 1.9}


def decoded_logprobs(model: str, backend: str, kv_cache_dtype: str) -> list[list[dict[int, float]]]:
    """Log-probabilities of 12 decode steps over caches whose scales are not 1."""
    with engine(model, backend, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype) as llm:
        if kv_cache_dtype != "auto":
            # As a checkpoint with calibrated scales sets them.
            for layer in worker(llm).compilation_config.static_forward_context.values():
                for name, scale in SCALES.items():
                    getattr(layer, name).fill_(scale)
                    setattr(layer, f"{name}_float", scale)
        results = generate(llm, PROMPTS, max_tokens=12, logprobs=20)
    return [
        [{token: entry.logprob for token, entry in step.items()} for step in steps]
        for _, steps in results
    ]


def decode_distance(
    one: list[list[dict[int, float]]], other: list[list[dict[int, float]]]
) -> float:
    """Mean distance of the steps until the greedy tokens part."""
    steps = []
    for ours, theirs in zip(one, other, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            steps.append((a, b))
            if max(a, key=a.__getitem__) != max(b, key=b.__getitem__):
                break
    assert len(steps) > 2 * len(one), "most requests are compared over some decode steps"
    return distance([a for a, _ in steps], [b for _, b in steps])


def test_decode_with_scales(model_dir: ModelStore) -> None:
    model = model_dir("llama-gqa")
    plain = decoded_logprobs(model, "CPU_ATTN", "auto")
    ours = decode_distance(decoded_logprobs(model, "BMC", "fp8"), plain)
    stock = decode_distance(decoded_logprobs(model, "CPU_ATTN", "fp8"), plain)
    assert 0 < ours <= stock
