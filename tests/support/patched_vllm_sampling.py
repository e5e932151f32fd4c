"""Run with a patched or a plain vLLM: what its samplers for CPUs do without ours.

Usage: patched_vllm_sampling.py FOLDER   Prints one line of JSON; the folder is not used.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import vllm
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_only
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.support.rejection import draft_metadata


def expanded() -> list[list[float]]:
    """Temperatures and top-k of two requests, for one and for two draft tokens."""
    found = []
    for values in (torch.tensor([0.7, 0.0]), torch.tensor([5, 9], dtype=torch.int32)):
        out = torch.full((3,), 77, dtype=values.dtype)
        ends = torch.tensor([1, 3], dtype=torch.int32)
        rejection_sampler._expand(out, values, ends, 0, 1)
        found.append([round(value, 3) for value in out.tolist()])
    return found


def top_k_of_no_rows() -> list[int] | str:
    try:
        found = apply_top_k_only(torch.empty(0, 8), torch.empty(0, dtype=torch.int32))
    except (RuntimeError, IndexError) as error:
        return str(error)
    return list(found.shape)


def sampler_of_a_step(drafts: list[list[int]]) -> str:
    batch = SimpleNamespace(sampling_metadata=None, update_async_output_token_ids=lambda: None)
    runner = SimpleNamespace(
        input_batch=batch,
        use_async_scheduling=False,
        sampler=lambda **arguments: "plain",
        rejection_sampler=lambda *arguments: "rejection",
        _get_spec_decode_draft_probs=lambda metadata: None,
    )
    return GPUModelRunner._sample(runner, None, draft_metadata(drafts))


def main() -> None:
    current_platform.register_triton_kernel_overrides()
    result = {
        "package": str(Path(vllm.__file__).parent),
        "expanded": expanded(),
        "top-k of no rows": top_k_of_no_rows(),
        "without drafts": sampler_of_a_step([[], []]),
        "with drafts": sampler_of_a_step([[3], []]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
