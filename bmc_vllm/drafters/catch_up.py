"""One forward pass of a draft model over rows that it missed, so that its K and V are whole again.

Promises to write to the draft model's own layers only, and to draft nothing. Knows nothing of
which rows are missing (`rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from bmc_vllm.drafters.rows import Span

NULL_BLOCK = 0
"""Stands in block tables for rows that a sliding window has left behind, and is never read."""


def catch_up(runner: Any, common: CommonAttentionMetadata, spans: Iterable[Span]) -> int:
    """Computes the draft model's K and V of `spans`; gives the number of rows.

    Args:
        runner: vLLM's model runner, whose batch holds the tokens.
        common: of the step, with the block tables of the draft model's layers.
    """
    rows = 0
    for part in parts(spans, runner.drafter.max_num_tokens):
        rows += sum(span.end - span.start for span in part)
        _forward(runner, common, part)
    return rows


def parts(spans: Iterable[Span], most: int) -> Iterator[list[Span]]:
    """The spans in order, cut into lists of at most `most` rows."""
    part: list[Span] = []
    room = most
    for place, start, end in spans:
        while start < end:
            stop = min(end, start + room)
            part.append(Span(place, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield part
                part, room = [], most
    if part:
        yield part


def _forward(runner: Any, common: CommonAttentionMetadata, part: list[Span]) -> None:
    drafter = runner.drafter
    ids = runner.input_batch.token_ids_cpu
    tokens = torch.from_numpy(np.concatenate([ids[i, start:end] for i, start, end in part]))
    positions = torch.from_numpy(np.concatenate([np.arange(start, end) for _, start, end in part]))
    metadata = _metadata(common, part, positions, drafter.block_size)
    count = metadata.num_actual_tokens
    if drafter.use_heterogeneous_vocab:
        tokens = drafter.vocab_mapping.map_target_to_draft_ids(tokens)
    drafter.input_ids[:count] = tokens
    drafter.positions[:count] = positions
    _, layers = drafter.build_per_group_and_layer_attn_metadata(metadata)
    mode, size, across = drafter._determine_batch_execution_and_padding(count)
    inputs, slots = drafter.build_model_inputs_first_pass(count, size, None)
    with set_forward_context(
        layers,
        drafter.vllm_config,
        num_tokens=size,
        num_tokens_across_dp=across,
        cudagraph_runtime_mode=mode,
        slot_mapping=drafter._get_slot_mapping(slots, metadata.slot_mapping),
    ):
        drafter.model(**inputs)


def _metadata(
    common: CommonAttentionMetadata, part: list[Span], positions: torch.Tensor, block_size: int
) -> CommonAttentionMetadata:
    """Attention metadata of these rows, each span a request of its own."""
    counts = torch.tensor([end - start for _, start, end in part], dtype=torch.int32)
    starts = torch.zeros(len(part) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, out=starts[1:])
    lengths = torch.tensor([span.end for span in part], dtype=torch.int32)
    table = common.block_table_tensor[[span.place for span in part]]
    owner = torch.repeat_interleave(torch.arange(len(part)), counts)
    blocks = table[owner, positions // block_size].long()
    slots = blocks * block_size + positions % block_size
    slots[blocks == NULL_BLOCK] = PADDING_SLOT_ID
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(part),
        num_actual_tokens=len(positions),
        max_query_len=int(counts.max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=slots,
        causal=True,
    )
