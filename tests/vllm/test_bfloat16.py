"""bfloat16: log-probabilities agree with CPU_ATTN's within a stated tolerance.

Both backends round keys, values and probabilities to bfloat16 (8 bits of mantissa), at different
places; on these models the difference of the top log-probabilities stays below 0.04 where the
tokens before are the same. Tokens may part where two candidates are closer than that.
"""

import pytest

from tests.support.engines import engine, generate, prompts_of
from tests.support.models import ModelStore

TOLERANCE = 0.08


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logprobs(model_dir: ModelStore, dtype: str) -> None:
    prompts = prompts_of((5, 33, 128, 300))
    results = []
    for backend in ("CPU_ATTN", "BMC"):
        with engine(model_dir("llama-gqa"), backend, dtype=dtype) as llm:
            results.append(generate(llm, prompts, max_tokens=16, logprobs=5))
    compared = 0
    for (tokens, logprobs), (bmc_tokens, bmc_logprobs) in zip(*results, strict=True):
        for step in range(len(tokens)):
            both = logprobs[step].keys() & bmc_logprobs[step].keys()
            assert both
            for token in both:
                difference = abs(logprobs[step][token].logprob - bmc_logprobs[step][token].logprob)
                assert difference < TOLERANCE
                compared += 1
            if tokens[step] != bmc_tokens[step]:
                break
    # The first tokens at the very least, and in practice nearly all.
    assert compared >= 4 * 5
