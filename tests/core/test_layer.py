"""A layer's bound operator: the results and the errors of the checked functions, without them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.autograd import forward_ad

from bmc_core import layer as layer_module
from bmc_core import native
from bmc_core.attention import paged_attention, write_kv
from bmc_core.layer import AttentionLayer
from tests.support.odd_tensors import (
    fake,
    freed,
    freed_with_an_offset,
    negated,
    on_meta,
    shrunk,
    shrunk_with_gaps,
    sparse,
    with_history,
)
from tests.support.reference import Case, Inputs, cases
from tests.support.small_batch import small_inputs


def layer_of(inputs: Inputs, **changes) -> AttentionLayer:
    settings = {
        "scale": inputs.scale,
        "sliding_window": inputs.case.sliding_window,
        "alibi_slopes": inputs.slopes,
        "logits_soft_cap": inputs.case.logits_soft_cap,
        "sinks": inputs.sinks,
        "key_scale": inputs.case.key_scale,
        "value_scale": inputs.case.value_scale,
    }
    return AttentionLayer(**{**settings, **changes})


def nan_like(rows: torch.Tensor) -> torch.Tensor:
    return torch.full_like(rows, float("nan"))


def new_rows(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Arguments of a write, into blocks 1 and 0."""
    case = inputs.case
    key = torch.ones(3, case.kv_heads, case.head_size, dtype=case.dtype)
    slots = torch.tensor([case.block_size + 5, -1, 2])
    return {"key": key, "value": 2 * key, "kv_cache": inputs.kv_cache, "slot_mapping": slots}


def asked(inputs: Inputs) -> dict[str, Any]:
    """Arguments of an attention."""
    out = nan_like(inputs.query)
    return {
        "query": inputs.query,
        "kv_cache": inputs.kv_cache,
        "batch": inputs.batch(),
        "out": out,
        "tokens": len(out),
    }


def plan(shared: dict[str, Any]) -> None:
    """As another layer does that used the batch before."""
    shared["batch"].plan(shared["tokens"], 4, 2, 0)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that were checked in full."""
    calls: list[str] = []

    def recorded(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            calls.append(function.__name__)
            function(*args, **kwargs)

        return call

    for function in (write_kv, paged_attention):
        monkeypatch.setattr(layer_module, function.__name__, recorded(function))
    return calls


@pytest.mark.parametrize("isa", native.usable_isas())
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_results_are_those_of_the_checked_functions(isa: str, case: Case) -> None:
    with native.forced_isa(isa):
        inputs = Inputs(case)
        layer = layer_of(inputs)
        batch = inputs.batch()
        expected = inputs.run()
        for _ in range(3):
            out = nan_like(inputs.query)
            layer.attend(inputs.query, inputs.kv_cache, batch, out, len(out))
            assert torch.equal(out, expected)
        other = inputs.kv_cache.clone()
        rows = new_rows(inputs)
        scales = {"key_scale": case.key_scale, "value_scale": case.value_scale}
        write_kv(**{**rows, "kv_cache": other}, **scales)
        before = inputs.kv_cache.clone()
        for _ in range(3):
            inputs.kv_cache.copy_(before)
            layer.write(**rows)
            assert torch.equal(inputs.kv_cache.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_call_like_one_before_is_not_checked_again(
    checked: list[str], cache_dtype: torch.dtype | None
) -> None:
    inputs = Inputs(Case([40, 20], [1, 2], dtype=torch.bfloat16, cache_dtype=cache_dtype))
    layers = layer_of(inputs), layer_of(inputs)
    for _ in range(3):
        batch = inputs.batch()
        for layer in layers:
            layer.write(**new_rows(inputs))
            layer.attend(**{**asked(inputs), "batch": batch})
    # Each layer once, then the first of every step: a batch is new then.
    assert checked == ["write_kv", "paged_attention"] * 2 + ["paged_attention"] * 2


def test_tokens_and_strides_may_change(checked: list[str]) -> None:
    """Rows of a fused buffer, and as many as the step has."""
    inputs = small_inputs()
    layer = bound_layer(inputs)
    expected = inputs.run()
    wide = torch.zeros(3, 8, 64)
    wide[:, 2:6] = inputs.query
    wide[:, 6:] = 3.0
    shared = {**asked(inputs), "query": wide[:, 2:6]}
    plan(shared)
    checked.clear()
    layer.attend(**shared)
    assert torch.equal(shared["out"], expected)
    rows = {**new_rows(inputs), "key": wide[:1, 6:], "value": wide[:1, :2]}
    layer.write(**rows)  # more slots than tokens
    other = inputs.kv_cache.clone()
    write_kv(**{**rows, "kv_cache": other})
    assert torch.equal(inputs.kv_cache, other)
    assert checked == []


@pytest.mark.parametrize("bound", [True, False])
def test_padding_is_neither_read_nor_written(checked: list[str], bound: bool) -> None:
    """Rows past the batch, and past the slots."""
    inputs = small_inputs()
    expected = inputs.run()
    layer = bound_layer(inputs) if bound else layer_of(inputs)
    query, out = (torch.full((8, 4, 64), float("nan")) for _ in range(2))
    query[:3] = inputs.query
    plan(shared := {**asked(inputs), "query": query, "out": out})
    rows = {**new_rows(inputs), "slot_mapping": torch.tensor([33])}
    written = inputs.kv_cache.clone()
    write_kv(rows["key"][:1], rows["value"][:1], written, rows["slot_mapping"])
    checked.clear()
    layer.attend(**shared)
    layer.write(**rows)
    assert torch.equal(out[:3], expected)
    assert out[3:].isnan().all()
    assert torch.equal(inputs.kv_cache, written)
    assert checked == ([] if bound else ["paged_attention", "write_kv"])


def refusal_of(call: Callable[[], object]) -> tuple[type, str] | None:
    try:
        call()
    except (TypeError, ValueError, IndexError) as error:
        return type(error), str(error)
    return None


def bound_layer(inputs: Inputs, **changes) -> AttentionLayer:
    """A layer that has taken a write and an attention."""
    layer = layer_of(inputs, **changes)
    before = inputs.kv_cache.clone()
    layer.write(**new_rows(inputs))
    inputs.kv_cache.copy_(before)
    shared = asked(inputs)
    layer.attend(**shared)
    layer.attend(**shared)
    return layer


PER_HEAD = ("alibi_slopes", "sinks")
READ = ("query", "kv_cache", "batch", "out")
WRITTEN = ("key", "value", "kv_cache", "slot_mapping")


def assert_refused_alike(inputs: Inputs, name: str, change: Callable[[object], object]) -> None:
    """By the bound layer as by the checked function, in the same words, with nothing changed."""
    slopes, sinks = torch.ones(4), torch.ones(4)
    layer = bound_layer(inputs, alibi_slopes=slopes, sinks=sinks)
    before = inputs.kv_cache.clone()
    for names, arguments, checked_call, bound_call in (
        (READ + PER_HEAD, asked(inputs), paged_attention, layer.attend),
        (WRITTEN, new_rows(inputs), write_kv, layer.write),
    ):
        if name not in names:
            continue
        settings = {}
        if bound_call == layer.attend:
            settings = {"scale": layer.scale, "alibi_slopes": slopes, "sinks": sinks}
            plan(arguments)
            arguments["out"].zero_()
        if name in PER_HEAD:
            setattr(layer, name, changed := change(settings[name]))
            settings[name] = changed
        else:
            arguments[name] = change(arguments[name])
        checked_arguments = {key: arguments[key] for key in names if key in arguments}
        expected = refusal_of(lambda: checked_call(**checked_arguments, **settings))  # noqa: B023
        assert expected is not None
        assert refusal_of(lambda: bound_call(**arguments)) == expected  # noqa: B023
        if name != "out" and checked_call is paged_attention:
            assert (arguments["out"] == 0).all()
    assert torch.equal(inputs.kv_cache, before)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "change",
    [
        negated,
        fake,
        freed,
        freed_with_an_offset,
        shrunk,
        shrunk_with_gaps,
        on_meta,
        sparse,
        lambda tensor: tensor.to(torch.float64),
        lambda tensor: tensor[..., None],
        lambda tensor: tensor.tolist(),
    ],
)
@pytest.mark.parametrize("name", [*dict.fromkeys(("query", "out", *WRITTEN)), *PER_HEAD])
def test_wrong_tensors_are_refused_alike(
    name: str, change: Callable[[torch.Tensor], object]
) -> None:
    assert_refused_alike(small_inputs(), name, change)


def test_what_does_not_go_together_is_refused_alike() -> None:
    inputs = small_inputs()
    cached = inputs.kv_cache.view(-1)
    for name, change in (
        ("query", lambda rows: rows[:2]),
        ("query", lambda rows: rows[:, :2]),
        ("query", lambda rows: rows[..., :32]),
        ("query", lambda rows: rows.transpose(1, 2).contiguous().transpose(1, 2)),
        ("out", lambda rows: rows[:2]),
        ("out", lambda rows: rows[:1].expand_as(rows)),
        ("out", lambda rows: cached[100:868].view(3, 4, 64)),
        ("batch", lambda batch: None),
        ("batch", lambda batch: Inputs(Case([40], [3], block_size=16)).batch()),
        ("batch", lambda batch: Inputs(Case([1500], [3])).batch()),
        ("key", lambda rows: rows[:2]),
        ("value", lambda rows: rows[:, :1]),
        ("key", lambda rows: cached[100:484].view(3, 2, 64)),
        ("value", lambda rows: cached[100:484].view(3, 2, 64)),
        ("slot_mapping", lambda slots: slots.repeat_interleave(2)[::2]),
        ("slot_mapping", lambda slots: slots.int()),
        ("slot_mapping", lambda slots: slots + (1 << 40)),
        ("sinks", lambda values: values[:3]),
        ("alibi_slopes", lambda values: values.repeat_interleave(2)[::2]),
    ):
        assert_refused_alike(inputs, name, change)


def test_out_on_the_sinks_is_refused() -> None:
    inputs = small_inputs()
    flat = torch.zeros(3 * 4 * 64)
    layer = bound_layer(inputs, sinks=flat[:4])
    shared = asked(inputs)
    plan(shared)
    with pytest.raises(ValueError, match="^out shares memory with sinks"):
        layer.attend(**{**shared, "out": flat.view(3, 4, 64)})


def test_gradients_are_refused_where_they_would_be_lost() -> None:
    inputs = small_inputs()
    for name in ("query", "out", "key", "value", *PER_HEAD):
        assert_refused_alike(inputs, name, with_history)
    layer, expected = bound_layer(inputs), inputs.run()
    shared = asked(inputs)
    plan(shared)
    with torch.no_grad():
        layer.attend(**{**shared, "query": with_history(inputs.query)})
    assert torch.equal(shared["out"], expected)
    with forward_ad.dual_level():
        tangent = forward_ad.make_dual(inputs.query, torch.ones_like(inputs.query))
        with torch.no_grad(), pytest.raises(ValueError, match="^query carries a forward-mode tan"):
            layer.attend(**{**shared, "query": tangent})
        rows = new_rows(inputs)
        rows["key"] = forward_ad.make_dual(rows["key"], rows["key"])
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="^key carries a forward-mode tan"),
        ):
            layer.write(**rows)


def test_what_the_checked_functions_take_is_taken() -> None:
    """Forms that a layer does not bind: they are checked, and right."""

    class Named(torch.Tensor):
        pass

    inputs = small_inputs()
    layer, expected = bound_layer(inputs), inputs.run()
    fused = torch.zeros(3, 12, 64)
    fused[:, :4] = inputs.query
    on_itself = inputs.query.clone()
    for query, out in (
        (inputs.query.as_subclass(Named), torch.empty(3, 4, 64)),
        (torch.nn.Parameter(inputs.query, requires_grad=False), torch.empty(3, 4, 64)),
        (on_itself, on_itself),
        (fused[:, :4], fused[:, 5:9]),
        (inputs.query, torch.empty(4, 3, 64).transpose(0, 1)),
    ):
        shared = {**asked(inputs), "query": query, "out": out}
        plan(shared)
        layer.attend(**shared)
        assert torch.equal(out, expected)


def test_the_cache_may_move(checked: list[str]) -> None:
    """As when an engine gives its pool back and takes another: one check, then as before."""
    inputs = small_inputs()
    layer = bound_layer(inputs)
    first = inputs.kv_cache
    for cache in (2 * first, torch.cat([first, first]), first):
        inputs.kv_cache = cache
        shared, expected = asked(inputs), inputs.run()
        written = cache.clone()
        write_kv(**{**new_rows(inputs), "kv_cache": written})
        plan(shared)
        checked.clear()
        for _ in range(2):
            layer.attend(**{**shared, "out": (out := nan_like(inputs.query))})
            assert torch.equal(out, expected)
        for _ in range(2):
            cache[1, 0, 0] = -1.0  # where a row is to be written
            layer.write(**new_rows(inputs))
        cache[1, 0, 0] = written[1, 0, 0]
        assert torch.equal(cache, written)
        assert checked == ["paged_attention", "write_kv"]


def test_layers_with_other_settings_share_a_batch() -> None:
    inputs = Inputs(Case([90, 70], [1, 2]))
    settings = [
        {"scale": 0.1},
        {"scale": 0.3, "logits_soft_cap": 2.0},
        {"scale": 0.1, "sliding_window": 20},
        {"scale": 0.1, "sinks": torch.full((4,), 3.0)},
        {"scale": 0.1, "alibi_slopes": torch.full((4,), -0.2)},
    ]
    layers = [AttentionLayer(**one) for one in settings]
    outputs = []
    for _ in range(3):
        shared = asked(inputs)
        for layer, one in zip(layers, settings, strict=True):
            layer.attend(**{**shared, "out": (out := nan_like(inputs.query))})
            expected = nan_like(out)
            paged_attention(inputs.query, inputs.kv_cache, shared["batch"], expected, **one)
            assert torch.equal(out, expected)
            outputs.append(out)
    assert len({tuple(out.flatten().tolist()) for out in outputs}) == len(settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_cache_may_be_handed_as_bytes(checked: list[str], dtype: torch.dtype) -> None:
    case = Case([40, 20], [1, 2], dtype=dtype, cache_dtype=torch.float8_e4m3fn, key_scale=0.5)
    inputs = Inputs(case)
    expected = inputs.run()
    inputs.kv_cache = inputs.kv_cache.view(torch.uint8)
    layer = bound_layer(inputs, cache_dtype=torch.float8_e4m3fn)
    shared = asked(inputs)
    layer.attend(**shared)
    checked.clear()
    layer.attend(**{**shared, "out": (out := nan_like(inputs.query))})
    layer.write(**new_rows(inputs))
    assert torch.equal(out, expected)
    assert checked == []


def test_no_cache_is_kept_alive() -> None:
    inputs = small_inputs()
    layer = bound_layer(inputs)
    storage = weakref.ref(inputs.kv_cache.untyped_storage())
    cache = weakref.ref(inputs.kv_cache)
    del inputs
    gc.collect()
    assert cache() is None
    assert storage() is None
    del layer
