"""What this machine can do at most: read bandwidth, rate of matrix products, and floors by them.

Promises measured ceilings, in GB/s (1e9 bytes) and GFLOP/s: of reads the best median of several
methods, of products the best call of several sizes; that a product which this machine computes
slowly costs no more than about a second; and that a rate which says too little of the machine is
marked so. Knows nothing of attention.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch

from benchmarks.lib.record import Machine
from bmc_core.machine.memory import prefer_huge_pages

READS_OVER_L3 = 4
MIN_READ_BYTES = 512 << 20
READ_MEMORY_SHARE = 0.25
"""Share of the available memory that the buffer of the bandwidth measurement may take."""
SMALLEST_PRODUCT, LARGEST_PRODUCT = 64, 4096
"""Side of the square matrix in a product."""
PRODUCT_SECONDS = 1.0
"""For the products of one dtype, what stalls them not counted."""
STALLED_FACTOR = 3.0
"""How many times as long it may take where they are stalled."""
TELLING_PRODUCT = 1024
"""Side from which a product's rate is near what the processor can do."""
MIN_CALLS = 2
"""Of the product of one size: one to warm, one to time."""
BRIEF_SECONDS, BRIEF_CALLS = 0.01, 20
"""A brief product is called until either is reached: what stalls some calls misses others."""


class Ceiling(NamedTuple):
    """A measured rate.

    Attributes:
        rate: GB/s or GFLOP/s.
        method: which reached it.
        told: whether it says what the machine can do; not where only small products were tried.
    """

    rate: float
    method: str
    told: bool = True


class Floor(NamedTuple):
    """What a call takes at least here: the larger of its reads and its products at the ceilings.

    Attributes:
        ms: milliseconds.
        binds: "reads" or "products", whichever takes longer.
        told: whether it is known; not where products bind whose ceiling is not.
    """

    ms: float
    binds: str
    told: bool = True

    def __str__(self) -> str:
        return f"{self.ms:.3f} {self.binds}" if self.ms < 10 else f"{self.ms:.1f} {self.binds}"


def floor(
    num_bytes: float, flops: float, read_gb_s: float, gflops: float, gflops_told: bool = True
) -> Floor:
    """Of a call that reads so many bytes and computes so many floating-point operations.

    Args:
        gflops_told: `Ceiling.told` of `gflops`.
    """
    reads, products = num_bytes / read_gb_s / 1e6, flops / gflops / 1e6
    if products > reads:
        return Floor(products, "products", gflops_told)
    return Floor(reads, "reads")


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """torch's threads (one OpenMP pool serves all systems) inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def median_seconds(call: Callable[[], object], rounds: int) -> float:
    """Median seconds of `rounds` calls, after one that is not timed."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memchr.restype = ctypes.c_void_p
    return libc


def read_methods(buffer: torch.Tensor, pool: ThreadPoolExecutor) -> dict[str, Callable[[], object]]:
    """Ways to read every byte of `buffer` (uint8, zeros) once, by vector loads, on all threads."""
    floats = buffer.view(torch.float32)
    half = floats.numel() // 2
    matrix = floats[: floats.numel() // 4096 * 4096].view(-1, 4096)
    ones = torch.ones(4096)
    threads = torch.get_num_threads()
    part = buffer.numel() // threads

    def search(index: int) -> None:
        _libc().memchr(buffer.data_ptr() + index * part, 1, part)

    return {
        "sum of int64": lambda: buffer.view(torch.int64).sum(),
        "sum of float32": floats.sum,
        "matrix x vector": lambda: matrix.mv(ones),
        "dot product": lambda: torch.dot(floats[:half], floats[half:]),
        "memchr": lambda: list(pool.map(search, range(threads))),
    }


def read_bandwidth(num_bytes: int, rounds: int = 5) -> Ceiling:
    """GB/s of reading `num_bytes` on torch's current number of threads.

    Args:
        num_bytes: size of the buffer; should be several times the L3 cache.
        rounds: timed passes per method.
    """
    num_bytes = -(-num_bytes // 32768) * 32768
    # Zeros would be one shared page until written.
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    prefer_huge_pages(buffer)
    buffer.fill_(1).fill_(0)
    best = Ceiling(0.0, "")
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for method, call in read_methods(buffer, pool).items():
            rate = num_bytes / median_seconds(call, rounds) / 1e9
            best = max(best, Ceiling(rate, method))
    return best


def torch_product(dtype: str, size: int) -> Callable[[], object]:
    """`[size/2, size] x [size, size]`: size^3 operations."""
    left = torch.randn(size // 2, size).to(getattr(torch, dtype))
    right = torch.randn(size, size).to(getattr(torch, dtype))
    out = torch.empty(size // 2, size, dtype=left.dtype)
    return lambda: torch.mm(left, right, out=out)


def gemm_rate(
    dtype: str,
    largest: int = LARGEST_PRODUCT,
    rounds: int = 5,
    *,
    seconds: float = PRODUCT_SECONDS,
    product: Callable[[str, int], Callable[[], object]] = torch_product,
    clock: Callable[[], float] = time.perf_counter,
) -> Ceiling:
    """GFLOP/s of products in `dtype`: the best call of the sizes that fit into the time.

    A dtype for which the processor has no instruction may be a thousand times slower than another,
    so sizes grow from small ones, each eight times the work of the last, and only while the next
    is affordable at the best rate so far. Only best calls count: small products on several threads
    wait a thousand times their own length where another process has one of the cores.

    Args:
        dtype: torch's name.
        largest: side of the largest matrix.
        rounds: timed products of one size, as far as the time allows.
        seconds: for all calls together, about.
        product: makes the call of one size; `clock`: its seconds. For tests.
    """
    best = Ceiling(0.0, "")
    left, end = seconds, clock() + STALLED_FACTOR * seconds
    size = SMALLEST_PRODUCT
    while True:
        shortest, calls = _shortest_call(product(dtype, size), rounds, left, end, clock)
        left -= calls * shortest
        best = max(best, Ceiling(size**3 / shortest / 1e9, f"{size // 2}x{size}x{size}"))
        following = 2 * size
        affordable = MIN_CALLS * following**3 / best.rate / 1e9 <= left and clock() < end
        if following > largest or not affordable:
            return best._replace(told=size >= TELLING_PRODUCT)
        size = following


def _shortest_call(
    call: Callable[[], object],
    rounds: int,
    left: float,
    end: float,
    clock: Callable[[], float],
) -> tuple[float, int]:
    """Seconds of the shortest call but the first, and the number of calls.

    Two are made at least; further ones only within `left` seconds, each counted as the shortest,
    and until `end`.
    """
    begin = clock()
    call()
    shortest, calls = float("inf"), 1
    while True:
        start = clock()
        call()
        now = clock()
        shortest = min(shortest, now - start)
        calls += 1
        brief = now - begin < BRIEF_SECONDS and calls <= BRIEF_CALLS
        if calls * shortest >= left or now >= end or (calls > rounds and not brief):
            return shortest, calls


class Ceilings:
    """The ceilings of a run, measured when first asked for.

    Args:
        read_bytes: buffer of the bandwidth measurement.
        rounds: timed passes per method.
        gemm_size: side of the largest matrix.
    """

    def __init__(
        self, read_bytes: int = MIN_READ_BYTES, rounds: int = 4, gemm_size: int = LARGEST_PRODUCT
    ) -> None:
        self.read_bytes = read_bytes
        self.rounds = rounds
        self.gemm_size = gemm_size
        self.reads: dict[int, Ceiling] = {}
        self.gemms: dict[tuple[int, str], Ceiling] = {}

    def read(self, threads: int) -> Ceiling:
        """GB/s on `threads` threads."""
        if threads not in self.reads:
            with threads_set(threads):
                self.reads[threads] = read_bandwidth(self.read_bytes, self.rounds)
        return self.reads[threads]

    def measure_again(self) -> None:
        """All that was measured once more, after the cases: where others use the machine, the
        better counts."""
        for threads, read in list(self.reads.items()):
            del self.reads[threads]
            self.reads[threads] = max(read, self.read(threads))
        for key, gemm in list(self.gemms.items()):
            del self.gemms[key]
            again = self._gemm(*key)
            self.gemms[key] = max(gemm, again)._replace(told=gemm.told or again.told)

    def gemm(self, threads: int, dtype: str) -> Ceiling:
        """GFLOP/s on `threads` threads. Whoever widens the operands to float32 computes the same
        products, so that no dtype has a lower ceiling than that."""
        own = self._gemm(threads, dtype)
        wide = self._gemm(threads, "float32")
        if own.rate < wide.rate:
            return wide._replace(method=f"{wide.method}, in float32")
        return own._replace(told=own.told and wide.told)

    def _gemm(self, threads: int, dtype: str) -> Ceiling:
        if (threads, dtype) not in self.gemms:
            with threads_set(threads):
                rate = gemm_rate(dtype, self.gemm_size, self.rounds)
            self.gemms[threads, dtype] = rate
        return self.gemms[threads, dtype]

    def floor(self, num_bytes: float, flops: float, threads: int, dtype: str) -> Floor:
        """Of a call on `threads` threads; see `floor`."""
        gemm = self.gemm(threads, dtype)
        return floor(num_bytes, flops, self.read(threads).rate, gemm.rate, gemm.told)


def read_bytes_for(machine: Machine) -> int:
    """Bytes of the buffer to read: several L3 caches, so that none of them holds it, as far as
    memory allows."""
    wanted = max(MIN_READ_BYTES, READS_OVER_L3 * machine.l3_bytes)
    return min(wanted, int(READ_MEMORY_SHARE * machine.available_bytes))


def ceilings_of(machine: Machine) -> Ceilings:
    """Of the machine that this process runs on, measured when first asked for."""
    return Ceilings(read_bytes_for(machine))
