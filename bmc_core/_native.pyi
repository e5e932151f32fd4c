"""Types of the native module; what the arguments mean stands in csrc/bindings.cpp."""

from typing import Protocol

from torch import Tensor

class Plan:
    @property
    def num_tokens(self) -> int: ...
    def work_items(self) -> list[tuple[int, int, int, int, int, int, int, int, int]]:
        """(sequence, KV head, query begin, query count, KV begin, KV end, head begin, head count,
        split group or -1)
        """

class BoundLayer:
    """Both answer False, and have done nothing, where the call is not like the bound one."""

    def attend(
        self,
        plan: Plan,
        tokens: int,
        query: Tensor,
        kv_cache: Tensor,
        out: Tensor,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        /,
    ) -> bool: ...
    def write(
        self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor, /
    ) -> bool: ...

_Plan = Plan  # the class, where Module has a function of that name

class Module(Protocol):
    """What the module holds at its top level; `bmc_core.native.module()` gives it this type."""

    def usable_isas(self) -> list[str]: ...
    def isa(self) -> str: ...
    def select_isa(self, name: str, /) -> None: ...
    def num_threads(self) -> int: ...
    def Plan(  # noqa: N802
        self,
        query_start: int,
        seq_lens: int,
        first_rows: int,
        block_table: int,
        num_seqs: int,
        num_tokens: int,
        table_width: int,
        table_stride: int,
        block_size: int,
        num_query_heads: int,
        num_kv_heads: int,
        window: int,
        causal: bool,
        /,
    ) -> _Plan: ...
    def bind(
        self,
        kv_cache: Tensor,
        rows: Tensor,
        dtype: int,
        cache_type: int,
        scale: float,
        key_scale: float,
        value_scale: float,
        softcap: float,
        /,
    ) -> BoundLayer | None: ...
    def attend(
        self,
        plan: _Plan,
        num_tokens: int,
        query: int,
        query_stride_token: int,
        query_stride_head: int,
        out: int,
        out_stride_token: int,
        out_stride_head: int,
        cache: int,
        num_blocks: int,
        cache_stride_block: int,
        cache_stride_head: int,
        block_size: int,
        head_size: int,
        dtype: int,
        cache_type: int,
        scale: float,
        value_scale: float,
        softcap: float,
        alibi_slopes: int,
        sinks: int,
        /,
    ) -> None: ...
    def write(
        self,
        key: int,
        key_stride_token: int,
        key_stride_head: int,
        value: int,
        value_stride_token: int,
        value_stride_head: int,
        cache: int,
        cache_stride_block: int,
        cache_stride_head: int,
        slots: int,
        num_tokens: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_size: int,
        dtype: int,
        cache_type: int,
        key_scale: float,
        value_scale: float,
        /,
    ) -> None: ...
    def grow_in_place(
        self,
        base: int,
        room: int,
        parts: int,
        valid: int,
        old_stride: int,
        new_stride: int,
        /,
    ) -> None: ...
    def verify(
        self,
        logits: int,
        row_stride: int,
        num_rows: int,
        vocab: int,
        dtype: int,
        temperature: int,
        top_k: int,
        top_p: int,
        num_requests: int,
        target_rows: int,
        bonus_rows: int,
        draft_ends: int,
        draft_tokens: int,
        draft_probs: int,
        num_draft_tokens: int,
        seeds: int,
        tokens: int,
        width: int,
        /,
    ) -> None: ...
    def keep_top(
        self,
        logits: int,
        row_stride: int,
        num_rows: int,
        vocab: int,
        top_k: int,
        top_p: int,
        /,
    ) -> None: ...
