"""What forwards of a model cost here, by the number of rows and of rows that they attend to.

Promises to take about the seconds that it is given, five forwards at least, to leave no trace in
the model, and to draw no random numbers. The figures hold for the threads and attention of now.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from bmc_core.policy import BMCPolicy
from bmc_core.speculation import StepCosts
from bmc_core.speculation.costs import at
from bmc_transformers.cache import BMCCache

TARGET_ROWS = (1, 16, 4, 2, 3, 8, 6)
"""Rows of the forwards that are timed; the first two in any case."""
DRAFT_ROWS = (1, 4)
CONTEXT_TIMED_ROWS = (1, 4, 16)
"""Of these also the forwards over the long cache: attention bends less than linear layers do."""
BASE_ROWS = 16
CONTEXT_ROWS = 2048
MAX_CONTEXT_BYTES = 256 << 20
REPEATS = 3

Curve = tuple[tuple[int, float], ...]


class ForwardCosts(NamedTuple):
    """Rows of a forward -> seconds without attention over a cache; -> seconds per row of it."""

    forward: Curve
    attention: Curve


def forward_costs(
    model: PreTrainedModel, ids: torch.Tensor, *, rows: Sequence[int], seconds: float
) -> ForwardCosts:
    """Times forwards of so many rows over a short and a long cache of their own.

    Args:
        ids: `[1, length]`, tokens such as the model will see. rows: at least two numbers.
        seconds: after these it measures no more than it must.
    """
    most = max(rows)
    ids = ids[:, -most:].to(model.device)
    ids = ids.repeat(1, -(-most // ids.shape[1]))[:, :most]
    cache = BMCCache(model.config, BMCPolicy(r=128))
    with torch.no_grad():
        model(input_ids=ids[:, :1].expand(1, BASE_ROWS), past_key_values=cache, use_cache=True)
        cache.activate_past_recording()

        def run(count: int) -> None:
            logits = model(input_ids=ids[:, :count], past_key_values=cache, use_cache=True).logits
            logits.to(torch.float32).clone().argmax(dim=-1).tolist()
            cache.crop(-count)

        near = _times(run, rows, 0.7 * seconds)
        context = _context_rows(model, cache, most)
        _fill(cache, context)
        far = _times(run, [n for n in rows if n in CONTEXT_TIMED_ROWS], 0.3 * seconds)
    attention = {n: max(0.0, far[n] - near[n]) / context for n in near if n in far}
    per_row = _rising(attention)
    forward = {n: max(near[n] - BASE_ROWS * at(per_row, n), 1e-6) for n in near}
    return ForwardCosts(_rising(forward), per_row)


def step_costs(target: ForwardCosts, draft: ForwardCosts | None) -> StepCosts:
    """The controller's costs of a model with this drafter; None: one whose drafts are free."""
    if draft is None:
        return StepCosts(forward=target.forward, attention=target.attention, draft=())
    return StepCosts(
        forward=target.forward,
        attention=target.attention,
        draft=((1, draft.forward[0][1]),),
        draft_attention=draft.attention,
    )


def _times(run: Callable[[int], None], rows: Sequence[int], seconds: float) -> dict[int, float]:
    """The least seconds of each; the first two at least once."""
    times: dict[int, float] = {}
    begun = perf_counter()
    for count in list(rows) * REPEATS:
        started = perf_counter()
        if len(times) >= 2 and started - begun > seconds:
            break
        run(count)
        times[count] = min(times.get(count, float("inf")), perf_counter() - started)
    return times


def _context_rows(model: PreTrainedModel, cache: BMCCache, most: int) -> int:
    """Rows of the long cache: what memory and the model's positions allow."""
    row_bytes = sum(layer.store.row_bytes for layer in cache.layers if layer.store is not None)
    rows = min(CONTEXT_ROWS, MAX_CONTEXT_BYTES // max(1, row_bytes))
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        rows = min(rows, positions - BASE_ROWS - most)
    return max(1, rows)


def _fill(cache: BMCCache, rows: int) -> None:
    for layer in cache.layers:
        key, value = layer.keys, layer.values
        if key is not None and value is not None:
            layer.update(*(t.new_zeros((*t.shape[:2], rows, t.shape[3])) for t in (key, value)))
    # What fills it is not to be undone: a window keeps what it needs and no more.
    cache.crop(0)


def _rising(points: dict[int, float]) -> Curve:
    """A curve that never falls: more rows are never cheaper."""
    rows = sorted(points)
    return tuple(zip(rows, itertools.accumulate((points[n] for n in rows), max), strict=True))
