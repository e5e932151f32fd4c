"""What both layouts of the chunked KV store promise, against a plain list of rows."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch._subclasses.fake_tensor import FakeTensorMode

from bmc_core.attention import DTYPES
from bmc_core.kv_store import KVStore, PackedStore
from bmc_core.machine.memory import PAGE
from bmc_core.policy import BMCPolicy
from tests.support.allocations import fail_each_allocation
from tests.support.mappings import resident_bytes
from tests.support.stores import HEADS, LAYOUTS, SIZE, filled, random_rows

POLICIES = [
    BMCPolicy(r=1),
    BMCPolicy(r=7),
    BMCPolicy(r=16),
    BMCPolicy(r=128),
    BMCPolicy(T=3),
    BMCPolicy.growing(),
    BMCPolicy.up_front(),
]


class StoreMachine(RuleBasedStateMachine):
    """Every operation on a store and on two plain tensors of valid rows."""

    layout: str

    @initialize(
        policy=st.sampled_from(POLICIES),
        batch=st.integers(1, 4),
        dtype=st.sampled_from(DTYPES),
        limit=st.sampled_from([40, 100, 300]),
        seed=st.integers(0, 2**16),
    )
    def start(self, policy, batch, dtype, limit, seed):
        torch.manual_seed(seed)
        self.store: KVStore = LAYOUTS[self.layout](policy, limit=limit)
        self.batch, self.dtype = batch, dtype
        self.key, self.value = random_rows(batch, 0, dtype)

    @rule(rows=st.integers(0, 3) | st.integers(0, 70), inference=st.booleans())
    def append(self, rows, inference):
        key, value = random_rows(self.batch, rows, self.dtype)
        with torch.inference_mode(inference):
            assert self.store.append(key, value) == 0
        self.key = torch.cat((self.key, key), dim=2)
        self.value = torch.cat((self.value, value), dim=2)

    @rule(rows=st.integers(1, 30), keep=st.integers(0, 60))
    def append_to_window(self, rows, keep):
        key, value = random_rows(self.batch, rows, self.dtype)
        before = self.store.length
        dropped = self.store.append(key, value, keep=keep)
        assert 0 <= dropped <= max(0, before - keep)
        self.key = torch.cat((self.key, key), dim=2)[:, :, dropped:]
        self.value = torch.cat((self.value, value), dim=2)[:, :, dropped:]

    @rule(fraction=st.floats(0, 1))
    def truncate(self, fraction):
        length = int(fraction * self.store.length)
        counters = copy.copy(self.store.counters)
        self.store.truncate(length)
        assert self.store.counters == counters  # no copy, no allocation
        self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]

    def _choose(self, indices):
        self.key, self.value = self.key[indices], self.value[indices]
        self.batch = len(indices)

    @precondition(lambda self: self.store.batch_size == self.batch)
    @rule(data=st.data())
    def reorder(self, data):
        one = st.integers(-self.batch, self.batch - 1)
        indices = torch.tensor(data.draw(st.lists(one, min_size=self.batch, max_size=self.batch)))
        held = self.store.counters.bytes_allocated
        self.store.reorder(indices)
        assert self.store.counters.bytes_allocated == held
        self._choose(indices)

    @precondition(lambda self: self.store.batch_size == self.batch)
    @rule(data=st.data())
    def select(self, data):
        one = st.integers(0, self.batch - 1)
        indices = torch.tensor(data.draw(st.lists(one, min_size=1, max_size=5)))
        self.store.select(indices)
        self._choose(indices)

    @precondition(lambda self: self.store.batch_size)
    @rule(other_batch=st.booleans())
    def clear(self, other_batch):
        capacity = self.store.capacity
        self.store.clear()
        assert self.store.capacity == capacity
        if other_batch:
            self.batch = self.batch % 4 + 1
        self.key, self.value = random_rows(self.batch, 0, self.dtype)

    @precondition(lambda self: self.store.length)
    @rule()
    def fail_to_grow(self):
        policy, limit = self.store.policy, self.store.limit
        self.store.policy, self.store.limit = BMCPolicy(r=2**50), None
        rows = self.store.capacity - self.store.length + 1
        try:
            with pytest.raises(RuntimeError, match="allocate"):
                self.store.append(*random_rows(self.batch, rows, self.dtype))
        finally:
            self.store.policy, self.store.limit = policy, limit

    @invariant()
    def same_rows(self):
        store = self.store
        assert store.capacity >= store.length == self.key.shape[2]
        assert store.capacity % store.row_multiple == 0
        assert store.counters.bytes_held == store.num_bytes
        assert store.counters.bytes_peak >= store.num_bytes
        if store.batch_size and store.batch_size == self.batch:
            assert torch.equal(store.keys(), self.key)
            assert torch.equal(store.values(), self.value)


class RowsMachine(StoreMachine):
    layout = "rows"


class PackedMachine(StoreMachine):
    layout = "packed"


for machine in (RowsMachine, PackedMachine):
    machine.TestCase.settings = settings(
        max_examples=150, stateful_step_count=25, deadline=None, derandomize=True
    )
TestRowsStore = RowsMachine.TestCase
TestPackedStore = PackedMachine.TestCase


def test_growths_are_the_policys(store: KVStore) -> None:
    for _ in range(100):
        store.append(*random_rows(1, 1))
    assert store.capacity == 128
    assert store.counters.growths == 4
    assert store.counters.rows_copied == 32 + 64 + 96
    row = 2 * HEADS * SIZE * 4
    assert store.counters.bytes_copied == (32 + 64 + 96) * row
    # Packed rows grow where they are from 32 to 64 rows, and from 96 to 128.
    allocated = {"rows": 32 + 64 + 96 + 128, "packed": 32 + 32 + 96 + 32}
    assert store.counters.bytes_allocated == allocated[store.layout] * row
    assert store.counters.bytes_held == 128 * row
    peak = {"rows": (128 + 128 + 96) // 2, "packed": 64 + 96}
    assert store.counters.bytes_peak == peak[store.layout] * row


def test_a_limit_is_not_exceeded_and_may_be_outgrown(store: KVStore) -> None:
    store.limit = 48
    filled(store)
    assert store.capacity == 48
    store.append(*random_rows(3, 20))
    assert store.capacity == 80


def test_a_window_keeps_its_memory_bounded(store: KVStore) -> None:
    store.append(*random_rows(1, 3000))
    for _ in range(500):
        store.append(*random_rows(1, 1), keep=50)
    assert store.capacity <= 128
    assert store.length >= 50


def test_gradients_do_not_enter_the_store(store: KVStore) -> None:
    key, value = random_rows(1, 3)
    store.append(key.requires_grad_(), value.requires_grad_())
    assert not store.keys().requires_grad
    assert torch.equal(store.keys(), key)


@pytest.mark.parametrize("inference", [True, False])
def test_tensors_of_inference_mode_may_be_used_outside(store: KVStore, inference: bool) -> None:
    with torch.inference_mode(inference):
        filled(store)
        store.reorder(torch.tensor([2, 1, 0]))
        store.select(torch.tensor([0, 1]))
    with torch.inference_mode(not inference):
        store.append(*random_rows(2, 40))
        store.reorder(torch.tensor([1, 0]))
    assert store.length == 80


def pickled(store: KVStore) -> KVStore:
    return pickle.loads(pickle.dumps(store))


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_copies_and_pickles_are_stores_of_their_own(
    store: KVStore, duplicate: Callable[[KVStore], KVStore], inference: bool
) -> None:
    """Wherever they are made: they may be written inside and outside `torch.inference_mode`."""
    filled(store)
    key, value = store.keys().clone(), store.values().clone()
    with torch.inference_mode(inference):
        twin = duplicate(store)
    assert (twin.length, twin.capacity) == (store.length, store.capacity)
    assert twin.counters == store.counters
    assert twin.counters is not store.counters
    new = random_rows(3, 1)
    twin.append(*new)
    twin.reorder(torch.tensor([1, 0, 2]))
    for held, old, added in zip((twin.keys(), twin.values()), (key, value), new, strict=True):
        assert torch.equal(held, torch.cat((old, added), dim=2)[[1, 0, 2]])
    assert torch.equal(store.keys(), key)
    assert torch.equal(store.values(), value)


def test_a_pickle_has_the_valid_rows_only(store: KVStore) -> None:
    """Not what was in the memory behind them, nor rows that were forgotten."""
    store.policy = BMCPolicy(r=4096)
    filled(store, batch=2, rows=30)
    secret = torch.full((2, HEADS, 30, SIZE), 1234.5)
    store.append(secret, secret)
    store.truncate(30)
    data = pickle.dumps(store)
    assert len(data) < 30 * store.row_bytes + 8192
    assert secret[0, 0, 0, :2].numpy().tobytes() not in data
    assert pickle.loads(data).capacity == store.capacity


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_an_empty_store_may_be_copied(
    store: KVStore, duplicate: Callable[[KVStore], KVStore]
) -> None:
    assert not duplicate(store).has_shape
    store.append(*random_rows(2, 0))
    twin = duplicate(store)
    assert twin.has_shape
    assert twin.append(*random_rows(2, 3)) == 0
    assert twin.keys().shape == (2, HEADS, 3, SIZE)


def test_a_batch_of_no_sequences_has_rows_too(store: KVStore) -> None:
    for rows in (40, 1, 1, 100):
        store.append(*random_rows(0, rows))
    assert store.append(*random_rows(0, 1), keep=5) >= 0
    store.reorder(torch.empty(0, dtype=torch.int64))
    twin = copy.deepcopy(store)
    assert twin.keys().shape == twin.values().shape == (0, HEADS, store.length, SIZE)
    store.clear()
    assert filled(store).keys().shape == (3, HEADS, 40, SIZE)


class Answering:
    """A policy of somebody's own."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def rows_to_hold(self, held: int, needed: int, limit: int | None = None) -> int:
        return self.answer  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"Answering({self.answer})"


@pytest.mark.parametrize("keep", [None, 16])
@pytest.mark.parametrize(
    ("answer", "error"), [(7, ValueError), (512.0, TypeError), (None, TypeError)]
)
def test_a_policys_wrong_answer_is_named_and_changes_nothing(
    store: KVStore, answer: object, error: type[Exception], keep: int | None
) -> None:
    filled(store, rows=64)
    key = store.keys().clone()
    store.policy = Answering(answer)
    message = rf"policy Answering\({answer}\): rows_to_hold\(.*\) is {answer}; allowed: an int >="
    with pytest.raises(error, match=message):
        store.append(*random_rows(3, 1), keep=keep)
    assert torch.equal(store.keys(), key)


class TestRowsOfOtherStrides:
    def test_rows_with_their_negative_bit_set_are_taken(self, store: KVStore) -> None:
        filled(store, batch=1, rows=64)
        key, value = random_rows(1, 1)
        assert store.append(torch._neg_view(key), value, keep=16) == 48
        assert torch.equal(store.keys()[:, :, -1:], -key)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_rows_with_their_sizes_apart_are_taken(self, store: KVStore, rows: int) -> None:
        filled(store, batch=2, rows=64)
        key, value = (
            part.transpose(2, 3).contiguous().transpose(2, 3) for part in random_rows(2, rows)
        )
        assert store.append(key, value, keep=16) == 48
        assert torch.equal(store.keys()[:, :, -rows:], key)
        assert torch.equal(store.values()[:, :, -rows:], value)

    @pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
    def test_rows_that_cannot_be_written_are_refused_before_any_is_dropped(
        self, store: KVStore
    ) -> None:
        filled(store, batch=1, rows=64)
        before = store.keys().clone()
        key, value = random_rows(1, 1)
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            store.append(key, FakeTensorMode().from_tensor(value), keep=16)
        assert torch.equal(store.keys(), before)


def test_first_rows_that_find_no_memory_leave_a_store_that_works(store: KVStore) -> None:
    def works() -> None:
        assert store.length == 0
        assert store.num_bytes == store.counters.bytes_held
        store.release()
        assert store.counters.bytes_held == 0
        filled(copy.deepcopy(store))

    assert fail_each_allocation(lambda: filled(store), works) > 0
    assert store.length == 40


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.append(*random_rows(2, 1)), ValueError, r"key \(2, 2, 1, 32\) .* allowed: "),
        (lambda s: s.append(*random_rows(3, 1, torch.float16)), ValueError, "float16"),
        (lambda s: s.append(*random_rows(3, 1, size=48)), ValueError, "allowed: "),
        (lambda s: s.truncate(41), ValueError, "length=41: expected 0 to 40"),
        (lambda s: s.truncate(-1), ValueError, "length=-1"),
        (lambda s: s.reorder(torch.tensor([0, 1])), ValueError, "2 of them; allowed: 3"),
        (lambda s: s.reorder(torch.tensor([0, 1, 3])), IndexError, r"\[0, 1, 3\]: allowed are"),
        (lambda s: s.select(torch.tensor([-4])), IndexError, "allowed are -3 to 2"),
        (lambda s: s.select(torch.tensor([0.5])), ValueError, "integers"),
        (lambda s: s.select(torch.tensor([[0]])), ValueError, "one dimension"),
    ],
)
def test_bad_calls_are_refused_and_change_nothing(store, call, error, message) -> None:
    filled(store)
    key, length, counters = store.keys().clone(), store.length, copy.copy(store.counters)
    with pytest.raises(error, match=message):
        call(store)
    assert (store.length, store.counters) == (length, counters)
    assert torch.equal(store.keys(), key)


def test_first_rows_must_go_together(store: KVStore) -> None:
    key, value = random_rows(1, 2)
    with pytest.raises(ValueError, match="expected \\[batch, heads, rows, head size\\]"):
        store.append(key, value[:, :, :1])
    with pytest.raises(ValueError, match="value is on meta; allowed: cpu"):
        store.append(key, value.to("meta"))
    assert store.length == 0
    with pytest.raises(ValueError, match="limit=-1"):
        type(store)(BMCPolicy(), limit=-1)


@pytest.mark.parametrize("call", ["slide", "slide far", "reorder"])
def test_whichever_allocation_fails_no_row_has_moved(store: KVStore, call: str) -> None:
    """Rows of three heads, of which two fit into the buffer that moves them."""
    rows = 6144
    store.policy = BMCPolicy(r=rows + 256)
    key, value = pair = [torch.randn(2, 3, rows, SIZE) for _ in "kv"]
    store.append(*pair)
    store.policy = BMCPolicy(r=128)
    dropped = {"slide": 256, "slide far": 2048, "reorder": 0}[call]
    new = [torch.randn(2, 3, 257, SIZE) for _ in "kv"]
    before = (store.length, store.capacity, store.epoch)
    counters = copy.copy(store.counters)

    def operation() -> None:
        if call == "reorder":
            store.reorder(torch.tensor([1, 0]))
        else:
            store.append(*new, keep=rows - dropped)

    def as_before() -> None:
        assert (store.length, store.capacity, store.epoch) == before
        assert store.counters == counters
        assert torch.equal(store.keys(), key)
        assert torch.equal(store.values(), value)

    failures = fail_each_allocation(operation, as_before)
    assert failures > 0 or (store.layout, call) == ("rows", "slide far"), "it needs no memory"
    for held, old, added in zip((store.keys(), store.values()), pair, new, strict=True):
        expected = old[[1, 0]] if call == "reorder" else torch.cat((old[:, :, dropped:], added), 2)
        assert torch.equal(held, expected)
    assert store.counters.copies == counters.copies + 1
    assert store.counters.growths == counters.growths


@pytest.fixture(params=[False, True], ids=["any algorithm", "deterministic algorithms"])
def algorithms(request) -> Iterator[None]:
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is asked of Linux")
@pytest.mark.usefixtures("algorithms")
def test_room_that_was_not_written_takes_no_memory(store: KVStore) -> None:
    """256 MiB of room, 1 MiB of rows; glibc never hands out so much from what was freed before."""
    store.policy = BMCPolicy(r=1 << 18)
    row_bytes = 2 * HEADS * SIZE * 4
    pair = random_rows(1, (1 << 20) // row_bytes)
    store.append(*pair)
    store.append(*random_rows(1, 1))
    tensors = (store.tensor(),) if isinstance(store, PackedStore) else store._tensors()
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) >= 128 << 20
    assert 1 << 20 <= sum(map(resident_bytes, tensors)) + 8 * PAGE <= 6 << 20
    assert torch.equal(store.keys()[:, :, :-1], pair[0])


def test_more_rows_than_there_are_addresses_is_no_memory(store: KVStore) -> None:
    store.policy = BMCPolicy(r=10**30)
    with pytest.raises(RuntimeError, match="allocate"):
        store.append(*random_rows(1, 1))
    assert store.length == store.capacity == 0


OUT_OF_MEMORY = """
import resource, torch
from bmc_core.kv_store import PackedStore, RowsStore
from bmc_core.policy import BMCPolicy

store = {layout}(BMCPolicy(r=64))
rows = torch.randn(2, 4, 64, 64)
store.append(rows, rows)
torch.ones(8, 8) @ torch.ones(8, 8)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
big = torch.randn(2, 4, 64, 64).expand(2, 4, 64, 64)
failed_at = None
for step in range(4000):
    try:
        store.append(big, big)
    except RuntimeError as error:
        assert "allocate" in str(error), error
        failed_at = store.length
        break
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert failed_at and failed_at == store.length and failed_at % 64 == 0
assert torch.equal(store.keys()[:, :, :64], rows) and torch.equal(store.values()[:, :, -64:], big)
store.append(big, big)
assert torch.equal(store.keys()[:, :, -64:], big) and store.length == failed_at + 64
print("recovered", failed_at)
"""


@pytest.mark.parametrize("layout", ["RowsStore", "PackedStore"])
def test_a_growth_that_finds_no_memory_leaves_the_rows(layout: str) -> None:
    """A real failure of the allocator, in a process whose address space is limited."""
    if resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY:
        pytest.skip("the address space is limited already")
    script = OUT_OF_MEMORY.format(layout=layout)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("recovered")


NO_BUFFER = """
import resource, torch
from bmc_core.kv_store import PackedStore
from bmc_core.policy import BMCPolicy

torch.set_num_threads(1)
store = PackedStore(BMCPolicy(r=64))
rows = torch.randn(2, 4, 64, 64)
store.append(rows, rows)
before = (store.length, store.capacity, store.num_bytes)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 10), hard))
found = None
try:
    store.append(rows, rows)
except RuntimeError as error:
    found = str(error)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert found == "can't allocate the buffer of a growth in place", found
assert before == (store.length, store.capacity, store.num_bytes)
assert torch.equal(store.keys(), rows) and torch.equal(store.values(), rows)
place = store.tensor().data_ptr()
store.append(rows, rows)
assert store.tensor().data_ptr() == place and torch.equal(store.keys()[:, :, 64:], rows)
"""


def test_a_growth_in_place_without_memory_for_its_buffer() -> None:
    """A real failure: the buffer of 512 KiB is asked of a limited address space (glibc maps it)."""
    if resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY:
        pytest.skip("the address space is limited already")
    done = subprocess.run(
        [sys.executable, "-c", NO_BUFFER],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
