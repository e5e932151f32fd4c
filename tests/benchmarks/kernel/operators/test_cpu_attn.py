"""CPU_ATTN is run as vLLM would run it."""

import pytest
import torch

from benchmarks.kernel.operators import cpu_attn
from benchmarks.lib.instruction_sets import best_of_machine


@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_attn_kernel_is_the_one_that_vllm_takes(head_size, block_size, dtype) -> None:
    vllm = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    ours = cpu_attn.kernel_name(best_of_machine(), dtype, block_size, head_size)
    assert ours == vllm._get_attn_isa(dtype, block_size, head_size)
