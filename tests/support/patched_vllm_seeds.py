"""Run with a patched or a plain vLLM: its own backend, seeds, and a prompt computed in parts.

Usage: patched_vllm_seeds.py FOLDER   Makes a tiny model in FOLDER and prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import vllm
from vllm import SamplingParams

from tests.support.engines import engine, prompts_of
from tests.support.models import ModelStore


def sampled(model: str, **settings: int) -> list[list[int]] | str:
    """Tokens of two prompts with seeds, or how the engine ended."""
    params = SamplingParams(seed=5, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of([200, 20])]
    with engine(model, "CPU_ATTN", **settings) as llm:
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        except RuntimeError as error:
            return str(error)
        return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    model = ModelStore(Path(sys.argv[1]))("llama-gqa")
    result = {
        "package": str(Path(vllm.__file__).parent),
        "whole": sampled(model),
        "in parts": sampled(model, max_num_batched_tokens=64, max_num_seqs=8),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
