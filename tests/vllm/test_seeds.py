"""Requests with a seed: the same tokens however their prompt is cut, beside whatever else runs.

Stock vLLM 0.32 ends the engine when a prompt with a seed is computed in parts on a CPU.
"""

from vllm import LLM, SamplingParams

from tests.support.engines import engine, prompts_of, scheduler
from tests.support.models import ModelStore

PROMPTS = prompts_of([300, 20, 150, 90], seed=3)
SEEDS = (11, 12, 11, None)


def sampled(llm: LLM) -> list[list[int]]:
    """Tokens of each prompt with its seed."""
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True, detokenize=False)
        for seed in SEEDS
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def seeded(tokens: list[list[int]]) -> list[list[int]]:
    return [t for t, seed in zip(tokens, SEEDS, strict=True) if seed is not None]


def test_prompts_in_parts_give_the_tokens_of_whole_prompts(model_dir: ModelStore) -> None:
    model = model_dir("llama-gqa")
    with engine(model, "CPU_ATTN", enable_prefix_caching=False) as llm:
        expected = seeded(sampled(llm))
        assert seeded(sampled(llm)) == expected
    assert expected[0] != expected[2], "another prompt"
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    with engine(model, "BMC", enable_prefix_caching=False, **settings) as llm:
        assert seeded(sampled(llm)) == expected
    with engine(model, "BMC", num_gpu_blocks_override=19, **settings) as llm:
        preempted = []
        preempt = scheduler(llm)._preempt_request
        scheduler(llm)._preempt_request = lambda request, *rest, **named: (
            preempted.append(request.request_id) or preempt(request, *rest, **named)
        )
        # Preempted, and computed again in parts: the generators go on where they were.
        assert seeded(sampled(llm)) == expected
        assert preempted
