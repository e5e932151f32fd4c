"""The "bmc" attention function: the native kernel where it can, transformers' own where it cannot.

Promises the result of transformers' attention for the same mask. The mask alone says who sees whom,
as with "sdpa"; `softcap` and `s_aux` (attention sinks), which "sdpa" ignores, are honored as
"eager" honors them. What the kernel lacks is computed from plain rows, with one log line.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bmc_core.log import log_once
from bmc_transformers.gradients import refuse_gradients, wants_gradients
from bmc_transformers.lazy import CausalMask, LazyTensor, PackedRows
from bmc_transformers.masks import bmc_mask

logger = logging.getLogger("bmc_transformers")

NAME = "bmc"

# Arguments that models pass to every attention function and that do not change the result. The
# window is among them: the mask has it already.
NEUTRAL = frozenset(
    (
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    )
)


def register_attention() -> None:
    """Makes "bmc" an attention implementation of transformers; again does no harm."""
    AttentionInterface.register(NAME, bmc_attention)
    AttentionMaskInterface.register(NAME, bmc_mask)


@torch.compiler.disable
def bmc_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query rows over K and V, for transformers' `AttentionInterface`.

    Args:
        module: the model's attention layer.
        query: `[batch, query heads, query rows, head size]`.
        key, value: `[batch, kv heads, rows, head size]`, plain, or the `PackedRows` of a BMCCache.
        attention_mask: from `bmc_mask`, or any mask that "sdpa" takes.
        dropout, scaling, is_causal: as for "sdpa".
        softcap: logits become `softcap * tanh(logit / softcap)`.
        s_aux: `[query heads]`, one more logit per head that takes part in the softmax only.

    Returns:
        `[batch, query rows, query heads, head size]`, and None (no attention weights).
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if isinstance(key, PackedRows):
        reason = _why_not_native(query, key, value, attention_mask, dropout, is_causal, kwargs)
        if reason is None:
            return _native(query, key, attention_mask, scaling, softcap, s_aux), None
        log_once(logger, f"bmc attention: plain torch attention is used, because {reason}")
        if attention_mask is None and is_causal:
            attention_mask = _causal_mask(query, key, aligned_to_end=True)
    query, key, value, attention_mask = map(_plain, (query, key, value, attention_mask))
    if softcap or s_aux is not None:
        if attention_mask is None and is_causal:
            # As "sdpa" reads it: with more rows than queries, a static cache's first step.
            attention_mask = _causal_mask(query, key, aligned_to_end=False)
        out = _eager(query, key, value, attention_mask, dropout, scaling, softcap, s_aux)
        return out, None
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


def _why_not_native(
    query: torch.Tensor,
    key: PackedRows,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    kwargs: dict[str, Any],
) -> str | None:
    """Why the kernel cannot be used for this call; None: it can.

    No number that changes from step to step is in it: it is logged once per wording.
    """
    store = key.store
    if (
        type(value) is not PackedRows
        or value.store is not store
        or (key.part, value.part) != (0, 1)
        or not key.is_current
        or key.is_modified
        or value.is_modified
    ):
        return "the model changed K or V between the cache and the attention"
    if mask is None:
        if not is_causal:
            return "attention is not causal"
    elif type(mask) is not CausalMask or mask.is_modified:
        return "the mask is more than causal with a window or left padding"
    elif mask.shape[2:] != (query.shape[2], key.shape[2]) or mask.shape[0] != query.shape[0]:
        return "the mask is of other rows than query and key"
    if dropout:
        return f"dropout is {dropout}"
    if query.dtype != key.dtype:
        return f"the query is {query.dtype}, the cache {key.dtype}"
    if query.shape[0] != key.shape[0]:
        return "the query is of another batch than the cache"
    for name, argument in kwargs.items():
        if argument is not None and name not in NEUTRAL:
            return f"the model passes {name}"
    return None


def _native(
    query: torch.Tensor,
    key: PackedRows,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    first_rows, window = None, None
    if isinstance(mask, CausalMask):
        first_rows, window = mask.first_rows, mask.window
    tracked = wants_gradients(query)
    out = key.store.attend(
        query.detach() if tracked else query,
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        rows=key.shape[2],
        first_rows=first_rows,
        sliding_window=window,
        logits_soft_cap=softcap or 0.0,
        sinks=None if sinks is None else sinks.detach().to(torch.float32).contiguous(),
    )
    return refuse_gradients(out) if tracked else out


def _plain(tensor: Any) -> Any:
    """The plain tensor behind a lazy one; keeps that gradients are refused."""
    if isinstance(tensor, LazyTensor):
        plain = tensor.plain()
        return refuse_gradients(plain) if wants_gradients(tensor) else plain
    return tensor


def _causal_mask(
    query: torch.Tensor, key: torch.Tensor, *, aligned_to_end: bool
) -> torch.Tensor | None:
    """bool `[queries, rows]`; None for one query, which sees all."""
    queries, rows = query.shape[2], key.shape[2]
    if queries == 1:
        return None
    visible = torch.ones(queries, rows, dtype=torch.bool, device=query.device)
    return visible.tril(rows - queries if aligned_to_end else 0)


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft cap or sinks, in plain torch; a query that sees nothing gives zeros."""
    batch, heads, queries, size = query.shape
    kv_heads, rows = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, size)
    logits = grouped @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
    logits = logits.view(batch, heads, queries, rows)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.float()
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask
    if sinks is not None:
        column = sinks.float().view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        logits = torch.cat((logits, column), dim=3)
    weights = torch.softmax(logits, dim=3)[..., :rows].nan_to_num(0.0).to(value.dtype)
    if dropout:
        weights = torch.dropout(weights, dropout, train=True)
    out = weights.reshape(batch, kv_heads, -1, rows) @ value
    return out.view(batch, heads, queries, -1).transpose(1, 2).contiguous()
