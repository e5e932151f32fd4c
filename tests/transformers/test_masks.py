"""The "bmc" mask function says the same as transformers' own, mask for mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from bmc_transformers.lazy import CausalMask
from bmc_transformers.masks import bmc_mask, causal_window, first_visible_rows


def by_pattern(mask: CausalMask) -> torch.Tensor:
    """The mask as the kernel understands it."""
    batch, _, queries, rows = mask.shape
    row, query = torch.arange(rows), torch.arange(rows - queries, rows)[:, None]
    visible = row <= query
    if mask.window is not None:
        visible = visible & (row > query - mask.window)
    first = torch.zeros(batch) if mask.first_rows is None else mask.first_rows
    return visible & (row >= first[:, None, None, None])


@st.composite
def arguments(draw):
    batch, queries, before = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(0, 20))
    )
    window = draw(st.none() | st.integers(1, 30))
    kept = before if window is None else min(before, window - 1)
    columns = before + queries
    padding = None
    kind = draw(st.sampled_from(["none", "left", "any", "short"]))
    if kind == "left":
        hidden = torch.tensor(
            draw(st.lists(st.integers(0, columns), min_size=batch, max_size=batch))
        )
        padding = torch.arange(columns) >= hidden[:, None]
    elif kind != "none":
        width = columns if kind == "any" else max(1, columns - 2)
        flat = st.lists(st.booleans(), min_size=batch * width, max_size=batch * width)
        padding = torch.tensor(draw(flat)).view(batch, width)
    return {
        "batch_size": batch,
        "q_length": queries,
        "kv_length": kept + queries,
        "q_offset": before,
        "kv_offset": before - kept,
        "mask_function": causal_mask_function
        if window is None
        else sliding_window_causal_mask_function(window),
        "attention_mask": padding,
        "local_size": window,
    }


@settings(max_examples=400, deadline=None, derandomize=True)
@given(arguments=arguments())
def test_same_as_the_written_out_mask(arguments) -> None:
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    mask = bmc_mask(**arguments)
    if mask is None:
        queries, rows = arguments["q_length"], arguments["kv_length"]
        assert expected.equal(
            torch.ones(queries, rows).tril(rows - queries).bool().expand_as(expected)
        )
        assert queries in (1, rows)
        return
    assert mask.shape == expected.shape
    assert mask.dtype == torch.bool
    assert torch.equal(mask & True, expected)  # an operation on it sees the plain mask
    if type(mask) is CausalMask:
        assert torch.equal(by_pattern(mask), expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(arguments=arguments())
def test_left_padding_is_never_written_out(arguments) -> None:
    padding = arguments["attention_mask"]
    rows, offset = arguments["kv_length"], arguments["kv_offset"]
    if padding is None or padding.shape[1] < rows + offset:
        return
    seen = padding[:, offset:].int()
    is_left = bool((seen.diff(dim=1) >= 0).all())
    known, first = first_visible_rows(padding, rows, offset)
    assert known == is_left
    if known and first is not None:
        assert torch.equal(first, rows - seen.sum(1, dtype=torch.int32))


@pytest.mark.parametrize(
    "function",
    [
        bidirectional_mask_function,
        chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
        sliding_window_bidirectional_mask_function(4),
        or_masks(causal_mask_function, bidirectional_mask_function),
        and_masks(causal_mask_function, sliding_window_overlay(4)),  # not how transformers does it
        and_masks(sliding_window_overlay(4), causal_mask_function, bidirectional_mask_function),
        lambda batch, head, query, row: row <= query,
    ],
)
def test_other_patterns_are_written_out(function) -> None:
    assert causal_window(function) == (False, None)
    mask = bmc_mask(2, 3, 9, 6, mask_function=function, allow_is_causal_skip=False)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, sdpa_mask(2, 3, 9, 6, mask_function=function))


def test_the_known_patterns() -> None:
    assert causal_window(causal_mask_function) == (True, None)
    assert causal_window(sliding_window_causal_mask_function(7)) == (True, 7)


def test_a_mask_that_must_be_written_out_is() -> None:
    assert type(bmc_mask(1, 4, 4, allow_is_causal_skip=False)) is torch.Tensor


def test_bidirectional_attention_needs_no_mask_where_sdpa_needs_none() -> None:
    arguments = {"mask_function": bidirectional_mask_function, "allow_is_causal_skip": False}
    assert bmc_mask(1, 4, 4, allow_is_bidirectional_skip=True, **arguments) is None


def test_rows_beyond_the_queries_are_written_out() -> None:
    """A static cache has more rows than there are tokens."""
    mask = bmc_mask(1, 2, 16, q_offset=3)
    assert torch.equal(mask, sdpa_mask(1, 2, 16, q_offset=3))


def test_writing_into_a_mask_is_noticed() -> None:
    mask = bmc_mask(1, 2, 8, q_offset=6)
    assert type(mask) is CausalMask
    assert not mask.is_modified
    mask.any()
    assert not mask.is_modified
    mask.masked_fill_(torch.ones(8, dtype=torch.bool), False)
    assert mask.is_modified
    assert not mask.any()
    with torch.inference_mode():
        mask = bmc_mask(1, 2, 8, q_offset=6)
        mask[:, :, 1] = False
        assert mask.is_modified
        assert not mask[:, :, 1].any()
