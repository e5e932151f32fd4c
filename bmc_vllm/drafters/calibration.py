"""What the parts of a speculative step cost here, measured when the engine starts.

Promises a few seconds, the real models, sampler and kernel, and no trace: what is computed is
thrown away, no random number is drawn, and a failure costs the figures, not the start. All ranks
of a split model run the same calls. Knows nothing of how lengths follow from costs.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from bmc_core.costs.verification import seconds_per_row
from bmc_core.speculation import StepCosts
from bmc_core.speculation.costs import Curve, at
from bmc_vllm.attention import FP8_KV_CACHE, BMCAttentionImpl
from bmc_vllm.speculative import runs_step_by_step

logger = logging.getLogger("vllm.bmc")

ROWS = (1, 8, 32, 2, 4, 16, 64, 12, 24, 48, 96, 128, 192, 256)
"""Of a batch, in the order in which they are measured: three always, others while time is left."""
FORWARD_SECONDS, DRAFT_SECONDS, ATTENTION_SECONDS, SAMPLER_SECONDS = 1.4, 0.7, 0.6, 0.3
ALWAYS = 3
ROUNDS = 3

Call = Callable[[int], object]


def measured_costs(runner: Any) -> StepCosts | None:
    """Costs of the parts of a step; None, with a line that says why, where they are unknown.

    Args:
        runner: vLLM's first model runner, warmed up, with KV caches and nothing in its batch.
    """
    if runner.parallel_config.data_parallel_size > 1:
        return None  # engines that wait for each other in every forward pass
    try:
        with torch.inference_mode():
            return _measured(runner)
    except Exception as error:
        # Whatever a model or method does not take here: lengths then follow from the steps.
        logger.warning(
            "BMC: speculation: costs were not measured: %s: %s", type(error).__name__, error
        )
        return None


def in_words(costs: StepCosts) -> str:
    """The outcome in one line."""
    steps = ", ".join(
        f"of {rows} row{'s' if rows > 1 else ''} {1e3 * seconds:.1f} ms"
        for rows, seconds in costs.forward
        if rows in (1, 8, 32)
    )
    words = [f"a step {steps} and {1e6 * costs.attention[0][1]:.2f} ms per 1000 context rows"]
    if costs.draft:
        words.append(f"draft step {1e3 * costs.draft[0][1]:.1f} ms")
    if costs.sampler:
        words.append(f"sampler {1e3 * costs.sampler[0][1]:.1f} ms")
    return "; ".join(words)


def _measured(runner: Any) -> StepCosts:
    most = runner.num_spec_tokens
    sequences = runner.scheduler_config.max_num_seqs
    hidden = torch.zeros(1)

    def forward(rows: int) -> None:
        nonlocal hidden
        hidden, _ = runner._dummy_run(rows, force_attention=True, skip_eplb=True)
        runner.model.compute_logits(hidden[:rows])

    with _without_drafter(runner), _outputs(runner.model) as outputs:
        order = _up_to(min(sequences * (most + 1), runner.max_num_tokens))
        steps = curve(order, forward, FORWARD_SECONDS)
        given = outputs[-1]
    draft, overhead = _draft_curve(runner, given)
    target, drafts = _implementations(runner)
    dtype = runner.model_config.dtype
    queries = sorted({min(rows, most + 1) for rows in (1, 2, 3, 5, 9, 17)})
    sampler = _sampler_curve(runner, runner.model.compute_logits(hidden[:1]))
    return StepCosts(
        forward=steps,
        attention=_attention_curve(target, dtype, queries) or ((1, 0.0),),
        draft=draft,
        draft_attention=_attention_curve(drafts, dtype, queries[:2]),
        sampler=sampler,
        draft_overhead=overhead,
    )


def curve(order: Sequence[int], call: Call, seconds: float) -> Curve:
    """Points (x, seconds of `call(x)`): the first `ALWAYS` of `order`, then those that fit."""
    points: dict[int, float] = {}
    end = time.perf_counter() + seconds
    for place, x in enumerate(order):
        if place >= ALWAYS:
            expected = 2 * at(tuple(sorted(points.items())), x)
            if not _agreed(time.perf_counter() + expected < end):
                continue
        call(x)  # pages, plans and kernels of this shape
        best = _timed(call, x)
        for _ in range(ROUNDS - 1):
            if not _agreed(time.perf_counter() + best < end):
                break
            best = min(best, _timed(call, x))
        points[x] = best
    return tuple(sorted(points.items()))


def _timed(call: Call, x: int) -> float:
    start = time.perf_counter()
    call(x)
    return time.perf_counter() - start


def _agreed(value: bool) -> bool:
    """What the first rank says: all must run the same calls."""
    return bool(get_tp_group().broadcast_object(value))


def _up_to(most: int) -> list[int]:
    """`ROWS` up to `most`, which stands for those beyond."""
    return list(dict.fromkeys(min(rows, most) for rows in ROWS))


@contextmanager
def _without_drafter(runner: Any) -> Iterator[None]:
    """vLLM's dummy steps run the drafter as well."""
    drafter = runner.drafter
    if not hasattr(drafter, "dummy_run"):
        yield
        return
    drafter.dummy_run = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del drafter.dummy_run


@contextmanager
def _outputs(model: torch.nn.Module) -> Iterator[list[Any]]:
    """The last output of a model, while this lasts."""
    outputs: list[Any] = [None]

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        outputs[-1] = output

    handle = model.register_forward_hook(note)
    try:
        yield outputs
    finally:
        handle.remove()


def _draft_curve(runner: Any, given: Any) -> tuple[Curve, float]:
    """One draft step by requests, and what a round takes beside its steps.

    Args:
        given: what the target's forward pass gave.
    """
    speculative = runner.speculative_config
    most = runner.num_spec_tokens
    order = _up_to(runner.scheduler_config.max_num_seqs)
    if speculative.method == "medusa":
        width = given.shape[-1]

        def heads(batch: int) -> None:
            runner.drafter.propose(most, _zeros(runner, batch, width), None)

        return _divided(curve(order, heads, DRAFT_SECONDS), most), 0.0
    if not (speculative.use_eagle() or speculative.uses_draft_model()):
        return (), 0.0
    width = given.shape[-1] if torch.is_tensor(given) else _width(given)

    def rounds(steps: int) -> Curve:
        return curve(order, lambda batch: _propose(runner, batch, steps, width), DRAFT_SECONDS / 2)

    if not runs_step_by_step(speculative):
        return _divided(rounds(most), most), 0.0
    configured = runner.drafter.num_speculative_tokens
    once = rounds(1)
    if most == 1:
        return once, 0.0
    steps = min(4, most)
    more = dict(rounds(steps))
    runner.drafter.num_speculative_tokens = configured
    one = tuple(
        # One more pass cannot take less than nothing: a neighbor took the rest.
        (batch, max((more[batch] - taken) / (steps - 1), more[batch] / steps / 2))
        for batch, taken in once
        if batch in more
    )
    return one, max(0.0, once[0][1] - one[0][1])


def _width(given: tuple[Any, Any]) -> int:
    """Of the hidden states that an EAGLE-3 head reads, those of several layers side by side."""
    return sum(states.shape[-1] for states in given[1])


def _divided(points: Curve, by: int) -> Curve:
    return tuple((x, seconds / by) for x, seconds in points)


def _zeros(runner: Any, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=runner.model_config.dtype)


def _propose(runner: Any, batch: int, steps: int, width: int) -> None:
    """A round of drafting for requests of one row; its rows go to the null block, where no request
    reads."""
    drafter = runner.drafter
    lengths = torch.ones(batch, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    blocks = runner.input_batch.block_table[drafter.kv_cache_gid].get_device_tensor(1).shape[1]
    drafter.propose(
        num_speculative_tokens=steps,
        target_token_ids=torch.zeros(batch, dtype=torch.int32),
        target_positions=torch.zeros(batch, dtype=torch.int64),
        target_hidden_states=_zeros(runner, batch, width),
        next_token_ids=torch.zeros(batch, dtype=torch.int32),
        token_indices_to_sample=None,
        common_attn_metadata=CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths.clone(),
            num_reqs=batch,
            num_actual_tokens=batch,
            max_query_len=1,
            max_seq_len=1,
            block_table_tensor=torch.zeros(batch, blocks, dtype=torch.int32),
            slot_mapping=torch.zeros(batch, dtype=torch.int64),
            causal=True,
        ),
        sampling_metadata=runner.input_batch.sampling_metadata,
    )


def _implementations(runner: Any) -> tuple[list[BMCAttentionImpl], list[BMCAttentionImpl]]:
    """Of the target's and of the draft's attention layers that see their whole context on BMC."""
    drafts = getattr(runner.drafter, "_draft_attn_layer_names", None) or set()
    found: tuple[list[BMCAttentionImpl], list[BMCAttentionImpl]] = ([], [])
    for name, layer in runner.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if isinstance(impl, BMCAttentionImpl) and impl.sliding_window is None:
            found[name in drafts].append(impl)
    return found


def _attention_curve(
    layers: Iterable[BMCAttentionImpl], dtype: torch.dtype, queries: Sequence[int]
) -> Curve:
    """Query rows -> seconds per context row, all layers of a model of `dtype` together."""
    kinds = Counter(
        (
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            FP8_KV_CACHE.get(layer.kv_cache_dtype, dtype),
        )
        for layer in layers
    )
    total = dict.fromkeys(queries, 0.0)
    for kind, count in kinds.items():
        seconds = seconds_per_row(*kind, queries, seconds=ATTENTION_SECONDS / len(kinds))
        for rows in queries:
            total[rows] += count * seconds[rows]
    return tuple(total.items()) if kinds else ()


def _sampler_curve(runner: Any, logits: torch.Tensor) -> Curve:
    """Rows sampled or verified -> seconds, greedy.

    Args:
        logits: `[1, vocabulary]`, as the model gives them.
    """
    each = runner.num_spec_tokens + 1
    batches = [batch for batch in (1, 4, 8) if batch <= runner.scheduler_config.max_num_seqs]
    # An empty batch is all greedy, and all random too.
    sampling = replace(runner.input_batch.sampling_metadata, all_random=False)
    order = [1, *(batch * each for batch in batches)]
    repeated = {rows: logits.repeat(rows, 1) for rows in order}

    def sample(rows: int) -> None:
        if rows == 1:
            runner.sampler(logits=repeated[1], sampling_metadata=sampling)
            return
        drafts = [[0] * (each - 1)] * (rows // each)
        verified = SpecDecodeMetadata.make_dummy(drafts, logits.device)
        runner.rejection_sampler(verified, None, repeated[rows], sampling)

    return curve(order, sample, SAMPLER_SECONDS)
