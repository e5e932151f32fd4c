"""Read bandwidth, products, floors."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.lib.ceilings import (
    Ceiling,
    Ceilings,
    Floor,
    ceilings_of,
    floor,
    gemm_rate,
    read_methods,
    threads_set,
)
from benchmarks.lib.record import describe

DTYPES = ("bfloat16", "float16", "float32")


def test_ceilings_are_positive_and_kept() -> None:
    ceilings = Ceilings(1 << 20, rounds=2, gemm_size=128)
    threads = torch.get_num_threads()
    for count in (1, 2):
        assert ceilings.read(count).rate > 0
        assert ceilings.read(count).method
    for dtype in DTYPES:
        assert ceilings.gemm(1, dtype).rate > 0
    before = ceilings.read(1)
    assert ceilings.read(1) is before
    products = ceilings.gemm(1, "float32")
    ceilings.measure_again()
    assert ceilings.read(1).rate >= before.rate
    assert ceilings.gemm(1, "float32").rate >= products.rate
    assert torch.get_num_threads() == threads


def test_what_is_read_exceeds_the_caches_as_far_as_memory_allows() -> None:
    machine = describe()._replace(l3_bytes=32 << 20, available_bytes=64 << 30)
    assert ceilings_of(machine).read_bytes == 512 << 20
    assert ceilings_of(machine._replace(l3_bytes=1 << 30)).read_bytes == 4 << 30
    little = machine._replace(l3_bytes=1 << 30, available_bytes=8 << 30)
    assert ceilings_of(little).read_bytes == 2 << 30


def test_every_way_of_reading_runs() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        methods = read_methods(torch.zeros(1 << 20, dtype=torch.uint8), pool)
        assert len(methods) >= 4
        for method in methods.values():
            method()


CALL_SECONDS, CLOCK_SECONDS = 20e-6, 1e-6
STALL_SECONDS = 50e-3
"""Of a thread that waits for its core."""


class Machine:
    """Computes products at a rate, with the overhead of a call; its clock takes time to read.

    Args:
        stalled: whether the call of that number waits for a core.
    """

    def __init__(self, gflops: float, stalled: Callable[[int], bool] = lambda call: False) -> None:
        self.gflops = gflops
        self.stalled = stalled
        self.now = 0.0
        self.sizes: list[int] = []

    def clock(self) -> float:
        self.now += CLOCK_SECONDS
        return self.now

    def product(self, dtype: str, size: int) -> Callable[[], object]:
        def call() -> None:
            self.sizes.append(size)
            self.now += CALL_SECONDS + size**3 / self.gflops / 1e9
            if self.stalled(len(self.sizes)):
                self.now += STALL_SECONDS

        return call

    def rate(self, **settings) -> Ceiling:
        return gemm_rate("float16", product=self.product, clock=self.clock, **settings)


@pytest.mark.parametrize(
    ("gflops", "largest"),
    [(0.001, 64), (0.05, 256), (0.5, 512), (20.0, 1024), (400.0, 4096), (5000.0, 4096)],
)
def test_products_grow_only_while_the_next_is_affordable(gflops: float, largest: int) -> None:
    """0.05 GFLOP/s: a dtype without an instruction, where the largest product takes 23 minutes."""
    machine = Machine(gflops)
    found = machine.rate()
    assert found.rate == pytest.approx(gflops, rel=0.05)
    assert found.rate < gflops, "an overhead is part of a call"
    assert machine.now < 1.5
    assert machine.sizes[0] == 64
    assert max(machine.sizes) == largest
    assert found.method == f"{largest // 2}x{largest}x{largest}"
    assert found.told == (largest >= 1024)
    for size in set(machine.sizes):
        assert 2 <= machine.sizes.count(size) <= 21


@pytest.mark.parametrize(
    "stalled",
    [
        pytest.param(lambda call: call % 2 == 0, id="every second call"),
        pytest.param(lambda call: call % 4 != 0, id="three of four calls"),
        pytest.param(lambda call: call < 6, id="the first five calls"),
    ],
)
@pytest.mark.parametrize("gflops", [20.0, 400.0, 1300.0])
def test_a_busy_machine_has_nearly_the_same_ceiling(
    gflops: float, stalled: Callable[[int], bool]
) -> None:
    machine = Machine(gflops, stalled)
    found = machine.rate()
    assert found.told
    assert found.rate == pytest.approx(gflops, rel=0.15)
    assert machine.now < 3.5


def test_a_slow_dtype_ends_on_a_busy_machine_too() -> None:
    for gflops in (0.001, 0.05, 1.0):
        machine = Machine(gflops, lambda call: call % 3 == 0)
        found = machine.rate()
        assert found.rate == pytest.approx(gflops, rel=0.05)
        assert not found.told
        assert machine.now < 2.0


def test_the_largest_size_and_the_seconds_can_be_chosen() -> None:
    machine = Machine(5000.0)
    assert not machine.rate(largest=256).told, "256 says little of 4096"
    assert max(machine.sizes) == 256
    slow = Machine(0.001)
    slow.rate(seconds=0.0)
    assert slow.sizes == [64, 64], "the smallest, once to warm and once to time"


def test_products_are_repeated_and_the_better_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter(
        [Ceiling(0.1, "disturbed", told=False), Ceiling(100.0, "f32"), Ceiling(400.0, "again"),
         Ceiling(90.0, "f32 again", told=False)]
    )  # fmt: skip
    monkeypatch.setattr("benchmarks.lib.ceilings.gemm_rate", lambda *_: next(found))
    ceilings = Ceilings(1 << 20)
    assert ceilings.gemm(1, "bfloat16") == Ceiling(100.0, "f32, in float32")
    ceilings.measure_again()
    assert ceilings.gemm(1, "bfloat16") == Ceiling(400.0, "again")
    assert ceilings.gemm(1, "float32") == Ceiling(100.0, "f32")


def test_a_ceiling_is_told_only_if_what_could_be_above_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """float32 from small products only: the float16 products could be faster widened."""
    rates = {"float16": Ceiling(20.0, "f16"), "float32": Ceiling(10.0, "f32", told=False)}
    monkeypatch.setattr("benchmarks.lib.ceilings.gemm_rate", lambda dtype, *_: rates[dtype])
    ceilings = Ceilings(1 << 20, rounds=1)
    assert ceilings.gemm(1, "float16") == Ceiling(20.0, "f16", told=False)
    assert not ceilings.floor(1, 1e9, 1, "float16").told
    assert ceilings.floor(1e12, 1, 1, "float16").told, "reads bind"


def test_a_slow_dtype_has_the_ceiling_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever widens the operands computes the same products."""
    rates = {"float16": 1.0, "float32": 100.0, "bfloat16": 400.0}
    monkeypatch.setattr(
        "benchmarks.lib.ceilings.gemm_rate", lambda dtype, *_: Ceiling(rates[dtype], dtype)
    )
    ceilings = Ceilings(1 << 20)
    assert ceilings.gemm(1, "float16") == Ceiling(100.0, "float32, in float32")
    assert ceilings.gemm(1, "bfloat16") == Ceiling(400.0, "bfloat16")


def test_a_floor_says_what_binds() -> None:
    """32 query heads on one KV head of 128: 64 operations a byte of bfloat16."""
    rows = 16384 * 1 * 128 * 2 * 2
    flops = 4 * 32 * 128 * 16384
    assert floor(rows, flops, 40.0, 400.0) == Floor(pytest.approx(flops / 400e6), "products")
    assert floor(rows, flops, 40.0, 4000.0) == Floor(pytest.approx(rows / 40e6), "reads")
    assert str(Floor(0.6711, "products")) == "0.671 products"
    assert str(Floor(33.46, "reads")) == "33.5 reads"


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with threads_set(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
