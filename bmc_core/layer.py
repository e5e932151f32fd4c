"""The attention operator for the layers of an engine: what never changes is checked once.

Promises the results and the errors of `write_kv` and `paged_attention`. A call like one that they
took before, in the same cache, goes straight to native code; every other call goes to them. What
can differ from call to call is looked at in every call: the shape and memory of each tensor, its
gradients. Keeps no cache alive. Knows nothing of frameworks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from bmc_core import native
from bmc_core.attention import (
    AttentionBatch,
    paged_attention,
    plan_key,
    type_codes,
    write_kv,
)

if TYPE_CHECKING:
    from bmc_core._native import BoundLayer


class AttentionLayer:
    """`write_kv` and `paged_attention` with one layer's settings, several times cheaper to call.

    The cache may move: it is given in every call, and a call with another one is checked in full.

    Args:
        scale, sliding_window, alibi_slopes, logits_soft_cap, sinks, key_scale, value_scale: as
            those two take them; checked in the first call.
        cache_dtype: what the cache's memory is read as, for callers that hold an fp8 cache as
            uint8; None: the cache's own dtype.
    """

    def __init__(
        self,
        *,
        scale: float,
        sliding_window: int | None = None,
        alibi_slopes: torch.Tensor | None = None,
        logits_soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        cache_dtype: torch.dtype | None = None,
        key_scale: float = 1.0,
        value_scale: float = 1.0,
    ) -> None:
        self.scale = scale
        self.sliding_window = sliding_window
        self.alibi_slopes = alibi_slopes
        self.logits_soft_cap = logits_soft_cap
        self.sinks = sinks
        self.cache_dtype = cache_dtype
        self.key_scale = key_scale
        self.value_scale = value_scale
        self._plan_key = (0, 0, 0)
        self._reads: BoundLayer | None = None
        self._writes: BoundLayer | None = None

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """`write_kv` with the layer's scales; rows of `key` and `value` past the slots are padding,
        and not written."""
        if (
            self._writes is not None
            and forward_ad._current_level < 0
            and self._writes.write(key, value, kv_cache, slot_mapping)
        ):
            return
        typed = self._typed(kv_cache)
        if isinstance(slot_mapping, torch.Tensor) and slot_mapping.dim() == 1:
            key = _first(key, len(slot_mapping))
            value = _first(value, len(slot_mapping))
        write_kv(
            key,
            value,
            typed,
            slot_mapping,
            key_scale=self.key_scale,
            value_scale=self.value_scale,
        )
        self._writes = self._bound(kv_cache, key, type_codes("key", key, typed))

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: AttentionBatch,
        out: torch.Tensor,
        tokens: int,
    ) -> None:
        """`paged_attention` with the layer's settings, of the first `tokens` rows of `query` and
        `out`, which are all of the batch's; the others are padding.

        The first layer of each geometry that uses a batch is checked in full, as is the batch.
        """
        plan = batch.planned(self._plan_key) if type(batch) is AttentionBatch else None
        if (
            plan is not None
            and self._reads is not None
            and forward_ad._current_level < 0
            and self._reads.attend(
                plan, tokens, query, kv_cache, out, self.alibi_slopes, self.sinks
            )
        ):
            return
        typed = self._typed(kv_cache)
        paged_attention(
            _first(query, tokens),
            typed,
            batch,
            _first(out, tokens),
            scale=self.scale,
            sliding_window=self.sliding_window,
            alibi_slopes=self.alibi_slopes,
            logits_soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            key_scale=self.key_scale,
            value_scale=self.value_scale,
        )
        if self._reads is None or plan is not None:
            self._plan_key = plan_key(query.shape[1], typed.shape[1], self.sliding_window)
            self._reads = self._bound(kv_cache, query, type_codes("query", query, typed))

    def _typed(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return kv_cache if self.cache_dtype is None else kv_cache.view(self.cache_dtype)

    def _bound(
        self, kv_cache: torch.Tensor, rows: torch.Tensor, codes: tuple[int, int]
    ) -> BoundLayer | None:
        """Native code for calls like one that was taken; None where it does not take the tensors
        themselves (subclasses, empty ones)."""
        return native.module().bind(
            kv_cache,
            rows,
            *codes,
            self.scale * self.key_scale,
            self.key_scale,
            self.value_scale,
            self.logits_soft_cap,
        )


def _first(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Without padding; what has none is not touched, whatever it is."""
    if isinstance(rows, torch.Tensor) and rows.dim() > 0 and rows.shape[0] > count:
        return rows[:count]
    return rows
