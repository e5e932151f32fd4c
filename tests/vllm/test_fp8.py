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
