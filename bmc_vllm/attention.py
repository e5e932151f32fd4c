"""The attention backend ``BMC``: vLLM's backend, metadata builder and implementation classes.

Promises vLLM's contract of an attention backend on top of ``bmc_core.attention``: keys and values
are written to the paged cache by ``do_kv_cache_update``, attention is read from it by ``forward``;
both run inside vLLM's opaque custom ops, eager and compiled alike. Knows nothing of how blocks
are handed out: correctness never depends on blocks being adjacent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from bmc_core.attention import (
    BLOCK_ROWS,
    DTYPES,
    HEAD_SIZES,
    AttentionBatch,
)
from bmc_core.layer import AttentionLayer
from bmc_vllm.kv_cache_interface import to_bmc_spec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


FP8_KV_CACHE = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Quantized caches by vLLM's names; vLLM hands them over as uint8."""

PLAIN_KV_CACHE = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Caches of a dtype by vLLM's names; the kernel takes the model's own."""

KNOWN_FIELDS = (
    "head_size",
    "dtype",
    "kv_cache_dtype",
    "block_size",
    "use_mla",
    "has_sink",
    "use_sparse",
    "use_mm_prefix",
    "use_per_head_quant_scales",
    "attn_type",
    "has_sliding_window",
    "use_non_causal",
    "use_batch_invariant",
    "use_kv_connector",
    "use_pcp",
    "use_adaptive_verification",
    "use_dcp",
    "use_rswa",
)
"""What vLLM 0.32 asks of a backend, the fields of its ``AttentionSelectorConfig``."""


def _unknown(layer: Mapping[str, Any]) -> list[str]:
    return [name for name in layer if name not in (*KNOWN_FIELDS, "device_capability")]


class BMCAttentionBackend(AttentionBackend):
    """What the kernel can take, in vLLM's terms."""

    # The cache is written by do_kv_cache_update, which vLLM calls before forward.
    forward_includes_kv_cache_update: bool = False

    supported_dtypes: ClassVar[list[torch.dtype]] = list(DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", *PLAIN_KV_CACHE, *FP8_KV_CACHE]

    @staticmethod
    def get_name() -> str:
        # vLLM looks this name up in AttentionBackendEnum.
        return "BMC"

    @staticmethod
    def get_impl_cls() -> type[BMCAttentionImpl]:
        return BMCAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[BMCAttentionMetadataBuilder]:
        return BMCAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_ROWS)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The kernel tiles the inside of a (block, head) and takes any stride of both. With heads
        # outside blocks, a head's rows in adjacent blocks are one stretch of memory, which reads
        # faster (docs/kernel-log.md); vLLM takes the second where layers differ in shape.
        return (KVCacheLayout.LHBNC, KVCacheLayout.LBHNC)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # A connector that unpacks blocks would meet our tiling.
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def validate_configuration(cls, *args: Any, **layer: Any) -> list[str]:
        """What the kernel cannot do of a layer; empty if it can do all.

        vLLM asks with the fields of its ``AttentionSelectorConfig``. A field that is none of
        ``KNOWN_FIELDS`` is refused unless it has its default.
        """
        known = {name: layer[name] for name in layer if name not in _unknown(layer)}
        reasons = super().validate_configuration(*args, **known)
        dtype = layer.get("dtype")
        if PLAIN_KV_CACHE.get(layer.get("kv_cache_dtype", "auto"), dtype) != dtype:
            reasons.append("kv_cache_dtype not supported")
        if layer.get("has_sliding_window") and layer.get("use_non_causal"):
            reasons.append("a sliding window with non-causal attention not supported")
        defaults = AttentionSelectorConfig._field_defaults
        for name in _unknown(layer):
            if (layer[name] or None) != (defaults.get(name) or None):
                reasons.append(f"{name}={layer[name]!r} not supported")
        return reasons

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The layer's spec as one whose blocks our managers hand out."""
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"attention backend BMC: the head sizes of keys ({spec.head_size}) and values "
                f"({spec.head_size_v}) differ; allowed: equal ones, with CPU_ATTN as well"
            )
        return to_bmc_spec(spec)


@dataclass
class BMCAttentionMetadata(AttentionMetadata):
    """One step of one KV cache group.

    Attributes:
        batch: the validated operator input, shared by all layers of the group.
        num_actual_tokens: tokens of the step without padding.
    """

    batch: AttentionBatch
    num_actual_tokens: int

    @property
    def causal(self) -> bool:
        """Asked by vLLM's drafters that need attention without a causal mask."""
        return self.batch.causal


class BMCAttentionMetadataBuilder(AttentionMetadataBuilder[BMCAttentionMetadata]):
    """Builds the operator's batch once per step."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        layers = vllm_config.compilation_config.static_forward_context
        impls = [layers[name].impl for name in layer_names]
        self._impls_with_sinks = [impl for impl in impls if impl.sinks is not None]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BMCAttentionMetadata:
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError(
                "attention backend BMC: a causal mask that differs per request is not supported; "
                "select CPU_ATTN"
            )
        # Weights may be written in place between two steps, and nothing tells of it.
        for impl in self._impls_with_sinks:
            impl.refresh_sinks()
        num_reqs = common.num_reqs
        batch = AttentionBatch(
            _first(common.query_start_loc, num_reqs + 1).to(torch.int32),
            _first(common.seq_lens, num_reqs).to(torch.int32),
            _first(common.block_table_tensor, num_reqs).to(torch.int32),
            self.block_size,
            causal=common.causal,
        )
        return BMCAttentionMetadata(batch, common.num_actual_tokens)


class BMCAttentionImpl(AttentionImpl[BMCAttentionMetadata]):
    """Attention of one layer.

    Raises:
        ValueError: a layer kind that the platform should have sent to another backend.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Sequence[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise ValueError(
                f"attention backend BMC: attn_type={attn_type!r}; allowed: "
                f"{AttentionType.DECODER.value!r}"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self._fp8 = FP8_KV_CACHE.get(kv_cache_dtype)
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        if sinks is not None and sinks.shape[0] != num_heads:
            raise ValueError(
                f"attention backend BMC: {sinks.shape[0]} attention sinks for {num_heads} heads"
            )
        self._sinks_parameter = sinks
        self.sinks: torch.Tensor | None = None
        self._operator: AttentionLayer | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        # The parameter is empty until the checkpoint is read.
        if self._sinks_parameter is not None:
            self.refresh_sinks()

    def refresh_sinks(self) -> None:
        """Takes the attention sinks over from their parameter; the kernel wants float32."""
        assert self._sinks_parameter is not None
        if self.sinks is None:
            self.sinks = torch.empty_like(
                self._sinks_parameter, dtype=torch.float32, memory_format=torch.contiguous_format
            ).requires_grad_(False)
        self.sinks.copy_(self._sinks_parameter.detach())

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: BMCAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over the cache; ``key`` and ``value`` were written to it before.

        Args:
            query: [T, num_heads, head_size], T may include padding.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], uint8 where quantized.
            attn_metadata: None while vLLM warms up.
            output: [T, num_heads, head_size], written for the tokens that are no padding.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "attention backend BMC: fused output quantization is not supported"
            )
        if attn_metadata is None:
            return output
        self._operator_of(layer).attend(
            query, kv_cache, attn_metadata.batch, output, attn_metadata.num_actual_tokens
        )
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes ``key`` and ``value`` ([T, num_kv_heads, head_size]) to their slots; -1 skips."""
        self._operator_of(layer).write(key, value, kv_cache, slot_mapping)

    def _operator_of(self, layer: Any) -> AttentionLayer:
        """The operator with the layer's settings; weights that are loaded again may change the
        sinks and, of a quantized cache, the scales."""
        operator = self._operator
        if (
            operator is not None
            and operator.sinks is self.sinks
            and (
                self._fp8 is None
                or (
                    operator.key_scale == layer._k_scale_float
                    and operator.value_scale == layer._v_scale_float
                )
            )
        ):
            return operator
        self._operator = AttentionLayer(
            scale=self.scale,
            sliding_window=self.sliding_window,
            alibi_slopes=self.alibi_slopes,
            logits_soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            cache_dtype=self._fp8,
            key_scale=1.0 if self._fp8 is None else layer._k_scale_float,
            value_scale=1.0 if self._fp8 is None else layer._v_scale_float,
        )
        return self._operator


def _first(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``rows[:count]``, without the price of a slice where that is all of them."""
    return rows if rows.shape[0] == count else rows[:count]
