"""BMCCache beside DynamicCache: the same answers to the same calls, in both layouts."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache, Qwen3NextConfig, T5Config

from bmc_core.policy import BMCPolicy
from bmc_transformers import BMCCache, enable
from bmc_transformers.layers import BMCSlidingLayer
from bmc_transformers.lazy import PackedRows
from tests.support.allocations import fail_each_allocation
from tests.support.architectures import build, generated, prompt
from tests.support.caches import HEADS, SIZE, WINDOW, config, contents, filled, rows


class CacheMachine(RuleBasedStateMachine):
    """Every call goes to both caches."""

    layout: str

    @initialize(
        r=st.sampled_from([1, 5, 16, 64]),
        batch=st.integers(1, 3),
        record=st.booleans(),
        window=st.sampled_from([2, WINDOW, 40]),
        max_length=st.none() | st.integers(1, 80),
    )
    def start(self, r, batch, record, window, max_length):
        torch.manual_seed(r)
        self.batch = batch
        self.since_crop = 0
        chosen = config(self.layout, window)
        self.ours = BMCCache(chosen, r, max_length=max_length)
        self.stock = DynamicCache(config=chosen)
        if record:
            self.ours.activate_past_recording()
            self.stock.activate_past_recording()

    @rule(count=st.integers(1, 3) | st.integers(1, 50), inference=st.booleans())
    def step(self, count, inference):
        self.since_crop += count
        for layer in range(2):
            sizes = self.ours.get_mask_sizes(count, layer)
            assert sizes == self.stock.get_mask_sizes(count, layer)
            key, value = rows(self.batch, count), rows(self.batch, count)
            with torch.inference_mode(inference):
                ours = self.ours.update(key, value, layer)
            stock = self.stock.update(key, value, layer)
            for one, other in zip(ours, stock, strict=True):
                assert one.shape == other.shape
                assert one.shape[2] == sizes[0]
                assert torch.equal(one + 0, other)

    @precondition(lambda self: self.stock.get_seq_length())  # stock fails where it is empty
    @rule(count=st.integers(0, 12))
    def crop(self, count):
        count = min(count, self.since_crop)  # stock has forgotten what was before, and is silent
        self.since_crop = 0
        before = copy.deepcopy(self.stock)
        try:
            self.stock.crop(-count)
        except RuntimeError:  # it records no past; ours may have the rows still
            self.stock = before
            return
        held = self.ours.stats()
        self.ours.crop(-count)
        after = self.ours.stats()
        assert (after.bytes_allocated, after.copies) == (held.bytes_allocated, held.copies)

    @precondition(lambda self: self.stock.get_seq_length())
    @rule(data=st.data())
    def reorder(self, data):
        one = st.integers(0, self.batch - 1)
        indices = torch.tensor(data.draw(st.lists(one, min_size=self.batch, max_size=self.batch)))
        self.ours.reorder_cache(indices)
        self.stock.reorder_cache(indices)

    @precondition(lambda self: self.stock.get_seq_length())
    @rule(data=st.data())
    def select(self, data):
        one = st.integers(0, self.batch - 1)
        indices = torch.tensor(data.draw(st.lists(one, min_size=1, max_size=4)))
        self.ours.batch_select_indices(indices)
        self.stock.batch_select_indices(indices)
        self.batch = len(indices)

    @precondition(lambda self: self.stock.get_seq_length() and self.batch < 4)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats):
        self.ours.batch_repeat_interleave(repeats)
        self.stock.batch_repeat_interleave(repeats)
        self.batch *= repeats

    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        self.since_crop = 0
        self.ours.reset()
        self.stock.reset()
        self.batch = batch

    @rule(pickled=st.booleans())
    def go_on_with_a_copy(self, pickled):
        if pickled:
            self.ours = pickle.loads(pickle.dumps(self.ours))
        else:
            self.ours = copy.deepcopy(self.ours)

    @invariant()
    def same_lengths(self):
        for layer in range(2):
            assert self.ours.get_seq_length(layer) == self.stock.get_seq_length(layer)
            assert self.ours.get_max_length(layer) == self.stock.get_max_length(layer)
        assert self.ours.is_sliding == self.stock.is_sliding
        assert self.ours.is_croppable == self.stock.is_croppable
        stats = self.ours.stats()
        assert stats.rows_spare == stats.rows_reserved - stats.rows_held >= 0
        stores = [layer.store for layer in self.ours.layers if layer.store is not None]
        assert stats.bytes_reserved == sum(store.num_bytes for store in stores)


class RowsMachine(CacheMachine):
    layout = "rows"


class PackedMachine(CacheMachine):
    layout = "packed"


for machine in (RowsMachine, PackedMachine):
    machine.TestCase.settings = settings(
        max_examples=60, stateful_step_count=25, deadline=None, derandomize=True
    )
TestRows = RowsMachine.TestCase
TestPacked = PackedMachine.TestCase


@pytest.mark.parametrize("layer", [0, 1])
def test_a_step_without_memory_is_undone_in_all_layers(layout: str, layer: int) -> None:
    cache = filled(layout, 32, window=100)
    before = contents(cache)
    good, cache.layers[layer].store.policy = cache.policy, BMCPolicy(r=2**50)
    key, value = rows(2, 40), rows(2, 40)
    for index in range(layer):
        cache.update(key, value, index)
    with pytest.raises(RuntimeError, match="allocate"):
        cache.update(key, value, layer)
    assert [cache.get_seq_length(index) for index in range(2)] == [32, 32]
    cache.layers[layer].store.policy = good
    for index in range(2):
        for part, tensor in enumerate(cache.update(key, value, index)):
            expected = torch.cat((before[2 * index + part], (key, value)[part]), dim=2)
            assert torch.equal(tensor + 0, expected)


def test_a_refused_step_is_undone_in_all_layers(layout: str) -> None:
    cache = filled(layout)
    cache.update(rows(2, 1), rows(2, 1), 0)
    with pytest.raises(ValueError, match="do not go with the rows that are held"):
        cache.update(rows(3, 1), rows(3, 1), 1)
    assert [cache.get_seq_length(index) for index in range(2)] == [30, 30]


def test_a_batch_that_finds_no_memory_changes_no_layer(layout: str) -> None:
    cache = filled(layout)
    before = contents(cache)
    with pytest.raises(RuntimeError, match="allocate"):
        cache.batch_select_indices(torch.zeros(1, dtype=torch.int64).expand(2**40))
    for one, other in zip(contents(cache), before, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 2]))
    for one, other in zip(contents(cache), before, strict=True):
        assert torch.equal(one, other)


def test_beams_that_find_no_memory_change_no_layer(layout: str) -> None:
    """Whichever allocation of a reordering fails; the second layer needs the larger buffer."""
    cache = filled(layout, 100, batch=3)
    order = torch.tensor([2, 0, 0])
    before, copies = contents(cache), cache.stats().copies

    def as_before() -> None:
        assert cache.stats().copies == copies
        for one, other in zip(contents(cache), before, strict=True):
            assert torch.equal(one, other)

    assert fail_each_allocation(lambda: cache.reorder_cache(order), as_before) > 0
    for one, other in zip(contents(cache), before, strict=True):
        assert torch.equal(one, other[order])


@pytest.mark.parametrize("made_in", [True, False])
def test_a_copy_goes_with_inference_mode_and_without(layout: str, made_in: bool) -> None:
    cache = filled(layout, 30)
    before = contents(cache)
    with torch.inference_mode(made_in):
        twin = copy.deepcopy(cache)
    key = rows(2, 1)
    with torch.inference_mode(not made_in):
        for layer in range(2):
            twin.update(key, key, layer)
        twin.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(twin.layers[1].keys, torch.cat((before[2], key), dim=2)[[1, 0]])
    for one, other in zip(contents(cache), before, strict=True):
        assert torch.equal(one, other)


def test_a_batch_of_no_sequences_is_dynamic_caches(layout: str) -> None:
    ours, stock = BMCCache(config(layout), 16), DynamicCache(config=config(layout))
    for count in (30, 1, 1, 20):
        for layer in range(2):
            key, value = rows(0, count), rows(0, count)
            pairs = zip(
                ours.update(key, value, layer), stock.update(key, value, layer), strict=True
            )
            assert all(one.shape == (other + 0).shape for one, other in pairs)
    assert ours.layers[1].keys.shape == stock.layers[1].keys.shape == (0, HEADS, 52, SIZE)
    again = filled(layout)
    again.batch_select_indices(torch.empty(0, dtype=torch.int64))
    assert [layer.keys.shape[0] for layer in again.layers] == [0, 0]


def test_reset_keeps_the_memory(layout: str) -> None:
    cache = filled(layout, 30)
    reserved = cache.stats().bytes_reserved
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.stats().bytes_reserved == reserved
    growths = cache.stats().growths
    for layer in range(2):
        cache.update(rows(2, 30), rows(2, 30), layer)
    assert cache.stats().growths == growths


def test_the_layout_follows_the_models_attention() -> None:
    cache = filled("packed")
    cache._stores.config._attn_implementation = "sdpa"
    assert isinstance(cache.update(rows(2, 1), rows(2, 1), 1)[0], PackedRows)
    cache.reset()
    assert type(cache.update(rows(2, 1), rows(2, 1), 1)[0]) is torch.Tensor
    assert cache.stats().layouts == {"packed": 1, "rows": 1}


@pytest.mark.parametrize("count", [0, 5, 30])
def test_iteration_is_dynamic_caches(layout: str, count: int) -> None:
    """A sliding layer may show more rows than stock's: the newest ones are those."""
    ours, stock = BMCCache(config(layout), 16), DynamicCache(config=config(layout))
    for layer in range(2 if count else 0):
        key, value = rows(2, count), rows(2, count)
        ours.update(key, value, layer)
        stock.update(key, value, layer)
    seen = list(zip(ours, stock, strict=True))
    assert len(seen) == 2
    for one, other in seen:
        assert [type(part) for part in one] == [type(part) for part in other]
        *pair, window = zip(one, other, strict=True)
        if window[1] is not None:
            assert (window[0].dtype, window[0].device) == (window[1].dtype, window[1].device)
            assert torch.equal(*window)
        for mine, theirs in pair if count else ():
            shown = theirs.shape[2]
            assert mine.shape[2] == shown if window[1] is None else mine.shape[2] >= shown
            assert torch.equal(mine[:, :, mine.shape[2] - shown :], theirs)
    again = DynamicCache(ddp_cache_data=ours, config=config(layout))
    assert [layer.is_initialized for layer in again.layers] == [count > 0] * 2


def test_rows_that_the_kernel_cannot_hold_stay_plain(caplog) -> None:
    cache = BMCCache(config("packed"), 16)
    odd = torch.randn(1, HEADS, 3, 40)
    cache.update(odd, odd, 0)
    cache.update(odd, odd, 1)
    assert cache.stats().layouts == {"rows": 2}
    assert [record.message for record in caplog.records] == [
        "BMCCache: plain rows and torch attention, because the head size is 40; "
        "the kernel takes 32 to 256 in steps of 16"
    ]


def test_early_initialization_and_iteration_over_layers() -> None:
    cache = BMCCache(config("packed"), 16)
    assert not cache.is_initialized
    assert cache.layers[0].keys is None
    cache.early_initialization(1, HEADS, SIZE, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert len(cache) == 2
    assert not cache.is_compileable
    assert isinstance(cache.layers[0], BMCSlidingLayer)
    cache.update(rows(1, 3), rows(1, 3), 0)
    assert cache.layers[0].keys.shape == (1, HEADS, 3, SIZE)


PEAK = """
import re, sys
from pathlib import Path
import torch
from transformers import DynamicCache, LlamaConfig
from bmc_transformers import BMCCache
from bmc_transformers.attention import register_attention

def high_water():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

kind = sys.argv[1]
register_attention()
config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=128)
config._attn_implementation = "bmc" if kind == "packed" else "sdpa"
cache = DynamicCache(config=config)
if kind != "dynamic":
    cache = BMCCache(config, 256, max_length=1040)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = high_water()
for _ in range(1040 // 16):
    for layer in range(2):
        key, value = (torch.ones(32, 16, 4, 32).transpose(1, 2) for _ in "kv")
        cache.update(key, value, layer)
print(high_water() - before)
"""


@pytest.fixture(scope="module")
def peak_resident() -> dict[str, int]:
    """KiB of resident memory that filling each kind of cache takes at most, in its own process."""
    children = {
        kind: subprocess.Popen(
            [sys.executable, "-c", PEAK, kind],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for kind in ("dynamic", "rows", "packed")
    }
    return {kind: int(child.communicate(timeout=120)[0]) for kind, child in children.items()}


def test_peak_memory_stays_below_dynamic_caches(layout: str, peak_resident: dict[str, int]) -> None:
    """Two layers of 34 MB, filled to the length that was announced."""
    assert peak_resident[layout] > 30 << 10
    assert peak_resident[layout] < peak_resident["dynamic"]


def test_a_cache_is_reused_over_several_generate_calls() -> None:
    """The second call gets the whole conversation and computes only what is new."""
    model = build("llama")
    first = generated(model, {"inputs": prompt()}, 10)
    longer = torch.cat((first.sequences, prompt()), dim=1)
    expected = generated(model, {"inputs": longer, "past_key_values": first.past_key_values}, 10)
    for attention in ("bmc", "stock"):
        enable(model, 16, attention=attention)
        cache = BMCCache(model.config, 16, max_length=25)  # too small on purpose
        again = generated(model, {"inputs": prompt(), "past_key_values": cache}, 10)
        again = generated(model, {"inputs": longer, "past_key_values": again.past_key_values}, 10)
        assert again.past_key_values is cache
        assert torch.equal(again.sequences, expected.sequences)
        cache.reset()
        again = generated(model, {"inputs": prompt(), "past_key_values": cache}, 10)
        assert torch.equal(again.sequences, first.sequences)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices"])
def test_an_interrupt_waits_until_all_layers_have_changed(
    layout: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGINT while the first layer changes: no layer keeps other sequences than the rest."""
    cache, order = BMCCache(config(layout), 16), torch.tensor([2, 0, 1])
    rows = [torch.randn(3, 4, 20, 32) for _ in cache.layers]
    for layer, key in enumerate(rows):
        cache.update(key, key, layer)
    reorders = change == "reorder_cache"
    owner: Any = torch if reorders else cache.layers[0].store
    name = "index_select" if reorders else "_adopt"
    real = getattr(owner, name)

    def interrupted(*args: Any, **settings: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **settings)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(cache, change)(order)
    assert len(rows) > 1
    for layer, key in zip(cache.layers, rows, strict=True):
        assert torch.equal(layer.keys, key[order])


def test_a_shared_prefix_is_copied_and_continued() -> None:
    model = enable(build("mistral"), 16)
    cache = BMCCache(model.config, 16)
    with torch.inference_mode():
        model(prompt(), past_key_values=cache)
    for seed in (1, 2):
        more = torch.cat((prompt(), torch.full((2, 3), seed + 7)), dim=1)
        twin = copy.deepcopy(cache)
        output = generated(model, {"inputs": more, "past_key_values": twin}, 12)
        assert torch.equal(output.sequences, generated(model, {"inputs": more}, 12).sequences)
    assert cache.get_seq_length() == prompt().shape[1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BMCCache(config(), "best"), ValueError, "policy='best': allowed are"),
        (lambda: BMCCache(config(), 0), ValueError, "policy=0: allowed are"),
        (lambda: BMCCache(config(), 1.5), TypeError, "policy=1.5"),
        (lambda: BMCCache(config(), 8, max_length=0), ValueError, "max_length=0"),
        (lambda: BMCCache(T5Config()), ValueError, "T5Config: encoder-decoder .* allowed"),
        (lambda: BMCCache(Qwen3NextConfig()), ValueError, "linear_attention; allowed: full"),
        (lambda: filled("rows").layers[0].offload(), NotImplementedError, "offloading"),
        (lambda: filled("rows").batch_repeat_interleave(0), ValueError, "repeats=0"),
    ],
)
def test_bad_settings_are_named(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_policy_that_needs_a_limit_takes_the_models() -> None:
    cache = BMCCache(config("rows"), BMCPolicy(T=4))
    cache.update(rows(1, 3), rows(1, 3), 1)
    assert cache.stats().rows_reserved == 64  # max_position_embeddings / 4


@pytest.mark.parametrize("config", [None, 3, torch.nn.Linear(2, 2)])
def test_what_is_no_configuration_is_named(config) -> None:
    """A model in its place is the likely mistake."""
    with pytest.raises(TypeError, match=r"config is a .*; allowed: .*model\.config"):
        BMCCache(config, 16)
