"""The "bmc" mask function: says what a mask is instead of writing it out.

Causal masks, with or without a window or left padding, become None or a `CausalMask`. Everything
else (holes in the padding, right padding, masks combined with other patterns, bidirectional
attention) becomes transformers' own boolean mask, by its own function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

from bmc_transformers.lazy import CausalMask

_AND_CODE = and_masks(causal_mask_function).__code__
_WINDOW_CODE = sliding_window_overlay(1).__code__


def causal_window(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a mask function is plainly causal, and its window if it has one.

    It is recognized by identity, and by the code of the closures that transformers builds it from,
    so that anything else, however similar, is not taken for it.
    """
    if mask_function is causal_mask_function:
        return True, None
    if getattr(mask_function, "__code__", None) is not _AND_CODE:
        return False, None
    parts = _closed_over(mask_function).get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return False, None
    if getattr(parts[0], "__code__", None) is not _WINDOW_CODE:
        return False, None
    window = _closed_over(parts[0]).get("sliding_window")
    return (True, window) if isinstance(window, int) and window > 0 else (False, None)


def _closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()  # type: ignore[attr-defined]
    names = function.__code__.co_freevars  # type: ignore[attr-defined]
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def first_visible_rows(
    padding_mask: torch.Tensor, kv_length: int, kv_offset: int
) -> tuple[bool, torch.Tensor | None]:
    """Whether a padding mask `[batch, columns]` hides nothing but rows at the beginning.

    Returns:
        That, and int32 `[batch]`: the first visible row of `kv_length` rows from `kv_offset` on;
        None where all are visible.
    """
    visible = padding_mask[:, kv_offset : kv_offset + kv_length]
    if visible.shape[1] < kv_length:
        return False, None
    count = visible.sum(dim=1, dtype=torch.int32)
    hidden = kv_length - count
    if not bool(hidden.any()):
        return True, None
    # As many True at the end as there are at all: none stands before a False.
    columns = torch.arange(kv_length, dtype=torch.int32)
    if torch.equal(visible.to(torch.bool), columns >= hidden[:, None]):
        return True, hidden
    return False, None


@torch.compiler.disable
def bmc_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for the "bmc" attention function; arguments as transformers' `sdpa_mask`.

    Returns:
        None: plainly causal, and `sdpa` needs no mask for it either. A `CausalMask`. Or a boolean
        `[batch, 1, queries, rows]`, True where a query attends.
    """
    written_out = partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        device=device,
        **kwargs,
    )
    is_causal, window = causal_window(mask_function)
    known = (
        is_causal
        and allow_is_causal_skip
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
        and torch.device(device).type == "cpu"
        and not torch.compiler.is_compiling()
    )
    first_rows = None
    if known and attention_mask is not None:
        known = attention_mask.dim() == 2 and attention_mask.shape[0] == batch_size
        if known:
            known, first_rows = first_visible_rows(attention_mask, kv_length, kv_offset)
    if not known:
        return written_out(
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        )
    if window is not None and window >= kv_length:
        window = None
    if first_rows is None and window is None and (q_length == 1 or q_length == kv_length):
        return None
    return CausalMask.of(
        (batch_size, 1, q_length, kv_length),
        first_rows=first_rows,
        window=window,
        maker=partial(written_out, allow_is_causal_skip=False),
    )
