"""One attention layer of a decode step so small that there is next to nothing to compute.

Promises that every side writes the same row and attends over the same 16. Knows nothing of clocks.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends import cpu_attn

from bmc_core import native
from bmc_core.attention import AttentionBatch
from bmc_vllm.attention import BMCAttentionImpl, BMCAttentionMetadata

QUERY_HEADS, KV_HEADS, HEAD_SIZE, ROWS, BLOCK = 8, 2, 64, 16, 32
DTYPE = torch.bfloat16
SCALE = HEAD_SIZE**-0.5
SHAPE = f"1 sequence of {ROWS} rows, {QUERY_HEADS}/{KV_HEADS} heads of {HEAD_SIZE}, bfloat16"


class Inputs:
    """A step's tensors, and the answer: the last of `ROWS` rows is the step's own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, HEAD_SIZE, generator=generator).to(DTYPE)

        self.query = random(1, QUERY_HEADS)
        self.keys, self.values = random(ROWS, KV_HEADS), random(ROWS, KV_HEADS)
        self.key, self.value = self.keys[-1:].clone(), self.values[-1:].clone()
        self.slots = BLOCK + torch.arange(ROWS)  # in block 1
        self.slot = self.slots[-1:].clone()
        self.query_start_loc = torch.tensor([0, 1], dtype=torch.int32)
        self.seq_lens = torch.tensor([ROWS], dtype=torch.int32)
        self.block_table = torch.tensor([[1, 0]], dtype=torch.int32)
        query, keys, values = (
            rows.float().transpose(0, 1) for rows in (self.query, self.keys, self.values)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, enable_gqa=True
        )
        self.reference = attended.transpose(0, 1)


class Layer:
    """A backend's layer, called as vLLM calls it.

    Attributes:
        name: in JSON rows.
        title: in tables.
        out: where `attend` writes.
    """

    name: str
    title: str
    impl: Any
    metadata: Any

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.out = torch.full_like(inputs.query, float("nan"))
        self.kv_cache = torch.zeros(4, KV_HEADS, BLOCK, 2 * HEAD_SIZE, dtype=DTYPE)
        self.layer = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)

    def load(self) -> None:
        """Writes all rows but the step's."""
        rows = self.inputs
        self.impl.do_kv_cache_update(
            self.layer, rows.keys[:-1], rows.values[:-1], self.kv_cache, rows.slots[:-1]
        )

    def write(self) -> None:
        rows = self.inputs
        self.impl.do_kv_cache_update(self.layer, rows.key, rows.value, self.kv_cache, rows.slot)

    def attend(self) -> None:
        rows = self.inputs
        self.impl.forward(
            self.layer, rows.query, rows.key, rows.value, self.kv_cache, self.metadata, self.out
        )


class BMCLayer(Layer):
    name, title = "bmc", "BMC"

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.impl = BMCAttentionImpl(QUERY_HEADS, HEAD_SIZE, SCALE, KV_HEADS)
        self.batch = AttentionBatch(
            inputs.query_start_loc, inputs.seq_lens, inputs.block_table, BLOCK
        )
        self.metadata = BMCAttentionMetadata(self.batch, 1)


class NativePart(BMCLayer):
    """BMC by addresses that were looked up before: what no binding could spare."""

    name, title = "bmc_native", "BMC's kernels alone"

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        cache = (self.kv_cache.data_ptr(), *self.kv_cache.stride()[:2])
        key, value = inputs.key, inputs.value
        self._write: Any = (
            *(key.data_ptr(), *key.stride()[:2], value.data_ptr(), *value.stride()[:2]),
            *(*cache, inputs.slot.data_ptr(), 1, len(self.kv_cache)),
            *(KV_HEADS, BLOCK, HEAD_SIZE, 2, 0, 1.0, 1.0),
        )
        query, out = inputs.query, self.out
        self._attend: Any = (
            *(self.batch.plan(1, QUERY_HEADS, KV_HEADS, 0), 1),
            *(query.data_ptr(), *query.stride()[:2], out.data_ptr(), *out.stride()[:2]),
            *(cache[0], len(self.kv_cache), *cache[1:]),
            *(BLOCK, HEAD_SIZE, 2, 0, SCALE, 1.0, 0.0, 0, 0),
        )
        self.native = native.module()

    def write(self) -> None:
        self.native.write(*self._write)

    def attend(self) -> None:
        self.native.attend(*self._attend)


class CPUAttnLayer(Layer):
    name, title = "cpu_attn", "CPU_ATTN"

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        config = VllmConfig()
        config.model_config = cast(Any, SimpleNamespace(dtype=DTYPE))
        with set_current_vllm_config(config):
            self.impl = cpu_attn.CPUAttentionBackendImpl(
                QUERY_HEADS, HEAD_SIZE, SCALE, KV_HEADS, None, None, "auto"
            )
        isa = cpu_attn._get_attn_isa(DTYPE, BLOCK, HEAD_SIZE)
        self.layer.isa = isa
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=QUERY_HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_SIZE,
            seq_lens=inputs.seq_lens,
            dtype=DTYPE,
            query_start_loc=inputs.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        self.metadata = cpu_attn.CPUAttentionMetadata(
            num_actual_tokens=1,
            max_query_len=1,
            query_start_loc=inputs.query_start_loc,
            max_seq_len=ROWS,
            seq_lens=inputs.seq_lens,
            block_table=inputs.block_table,
            slot_mapping=inputs.slot,
            scheduler_metadata=plan,
        )
