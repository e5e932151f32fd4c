"""The KV pool's pages: in memory from the start, or, where it is shared, only when used.

vLLM allocates the pool with one ``torch.zeros``. Inside ``KVPoolMemory.allocation()`` that call
gets an anonymous private mapping instead: the same zeros, in one of two ways.

- Committed: every page is touched by the compute threads, on huge pages where the system gives
  them. vLLM's check of the free memory stays a check: nobody else can be promised the same, and
  no token pays for pages that are cleared late.
- Shared: address space only. A page comes into being when it is first written, and goes back to
  the system when its blocks are released.

Promises: a pool that does not fit raises `KVPoolError`, which names the setting, the size and what
is free; a released page reads as zeros again; only whole pages inside the given blocks are
released. Knows nothing of which blocks are free: that is the scheduler's knowledge.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from bmc_core.machine.memory import PAGE, available_bytes, prefer_huge_pages

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("vllm.bmc")

PAGES_PER_THREAD = 1 << 15
"""Pages that a thread touches between two looks at the free memory: torch gives a thread no less,
so that a piece of that many pages for each occupies them all."""
PROGRESS_SECONDS = 5.0
RELEASE_CALLS = 256
RELEASE_BYTES = 32 << 20
"""What a step with tokens gives back at most: 5 us a system call and 0.15 us a page, measured on
two cores, make about 3 ms."""
MEASURED_PAGES = 1 << 18
"""Pages that one system call is asked about."""

_libc = ctypes.CDLL(None, use_errno=True)


class KVPoolError(MemoryError):
    """The KV pool does not fit into the memory."""


class _PoolZeros(TorchFunctionMode):
    """Answers ``torch.zeros(num_bytes, dtype=torch.int8)`` with the pool's mapping, once."""

    def __init__(self, memory: KVPoolMemory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            func is torch.zeros
            and not self.memory.mapped
            and args == (self.memory.num_bytes,)
            and kwargs.get("dtype") is torch.int8
        ):
            return self.memory.map()
        return func(*args, **kwargs)


class Region(NamedTuple):
    """Where pages of one size lie in the pool, one for each block, in bytes."""

    offset: int
    stride: int
    page: int


class KVPoolMemory:
    """The mapping behind one worker's KV pool.

    Args:
        num_bytes: of the pool, as vLLM will ask for it.
        shared: the memory is shared with others (``release_free_memory``): nothing is committed,
            and pages are small, since a huge page goes back only as a whole.
    """

    def __init__(self, num_bytes: int, *, shared: bool = False) -> None:
        self.num_bytes = num_bytes
        self.shared = shared
        self._mapping: mmap.mmap | None = None
        self._address = 0
        self._regions: list[Region] = []

    @property
    def mapped(self) -> bool:
        """Whether vLLM's allocation took the mapping."""
        return self._mapping is not None

    def allocation(self) -> TorchFunctionMode:
        """Context in which vLLM's allocation of the pool takes this mapping."""
        return _PoolZeros(self)

    def map(self) -> torch.Tensor:
        """An int8 tensor [num_bytes] of zeros; KVPoolError if there is no memory for it."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if self.shared:
            flags |= getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._mapping = mmap.mmap(-1, self.num_bytes, flags=flags)
        except OSError as error:
            raise self._too_large(f"the system refuses to map it: {error.strerror}") from error
        tensor = torch.frombuffer(self._mapping, dtype=torch.int8)
        self._address = tensor.data_ptr()
        if not self.shared:
            prefer_huge_pages(tensor)
            self._commit(tensor)
        return tensor

    def _commit(self, tensor: torch.Tensor) -> None:
        """Touches every page, on all compute threads."""
        piece = torch.get_num_threads() * PAGES_PER_THREAD * PAGE
        said = time.monotonic()
        for begin in range(0, self.num_bytes, piece):
            self._check_free(begin)
            tensor[begin : begin + piece : PAGE].fill_(0)
            now = time.monotonic()
            if now - said >= PROGRESS_SECONDS:
                said = now
                logger.info("BMC: KV pool: %s of %s in memory", gib(begin), gib(self.num_bytes))

    def _check_free(self, done: int) -> None:
        """Raises KVPoolError unless what is left after the first ``done`` bytes fits now.

        Asked for each piece: others may be starting, too. And asked at all: the system does not
        refuse a page that is touched, it ends a process.
        """
        free = available_bytes()
        if sys.platform == "linux" and free < self.num_bytes - done:
            raise self._too_large(
                f"{gib(free)} of memory are free"
                + f" ({gib(done)} of it are in memory)" * bool(done)
            )

    def _too_large(self, reason: str) -> KVPoolError:
        return KVPoolError(
            f"the KV pool of this worker takes {gib(self.num_bytes)}, and {reason}. Set "
            "VLLM_CPU_KVCACHE_SPACE (whole GiB) or kv_cache_memory_bytes to less, or free memory"
        )

    def set_layout(self, kv_cache_config: KVCacheConfig) -> None:
        """Learns where each layer's blocks lie in the pool."""
        self._regions = regions(kv_cache_config)

    def release(self, runs: Iterable[range]) -> None:
        """Gives the pages that lie wholly inside the blocks back to the operating system.

        The caller guarantees that nobody needs the blocks' contents, now or later.

        Args:
            runs: ids of blocks that follow each other. Each run is a system call for each region
                of `regions`.
        """
        if self._mapping is None:
            return
        for run in runs:
            for offset, stride, page in self._regions:
                if page == stride:
                    self._drop(offset + run.start * stride, offset + run.stop * stride)
                    continue
                for block_id in run:
                    start = offset + block_id * stride
                    self._drop(start, start + page)

    def _drop(self, start: int, end: int) -> None:
        assert self._mapping is not None
        start = -(-start // PAGE) * PAGE
        end = min(end, self.num_bytes) // PAGE * PAGE
        if start < end:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def resident_bytes(self) -> int:
        """Bytes of the pool that are in memory; 0 where the system does not tell.

        Visits every page; starts no thread, so that it may run beside a step.
        """
        if self._mapping is None:
            return 0
        resident = 0
        states = np.empty(MEASURED_PAGES, dtype=np.uint8)
        for begin in range(0, self.num_bytes, MEASURED_PAGES * PAGE):
            length = min(MEASURED_PAGES * PAGE, self.num_bytes - begin)
            address = ctypes.c_void_p(self._address + begin)
            if _libc.mincore(address, ctypes.c_size_t(length), ctypes.c_void_p(states.ctypes.data)):
                return 0
            # Only the lowest bit of each byte is defined.
            resident += int(np.count_nonzero(states[: -(-length // PAGE)] & 1))
        return resident * PAGE


def regions(kv_cache_config: KVCacheConfig) -> list[Region]:
    """The regions of a pool, by offset; pages that lie side by side for every block are one."""
    found: set[Region] = set()
    for tensor in kv_cache_config.kv_cache_tensors:
        # Layer-outermost: a layer is one dense region of blocks, or one for each head. Block-
        # outermost: the pages of all layers of a block lie side by side, layer_stride apart.
        size = tensor.block_stride * kv_cache_config.num_blocks
        dense = tensor.layer_stride >= size
        page = tensor.block_stride if dense else tensor.layer_stride
        for index in range(len(tensor.layers)):
            layer = tensor.offset + index * tensor.layer_stride
            for part in range(tensor.layer_stride // size if dense else 1):
                found.add(Region(layer + part * size, tensor.block_stride, page))
    merged: list[Region] = []
    for region in sorted(found):
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.stride == region.stride
            and last.offset + last.page == region.offset
            and last.page + region.page <= region.stride
        ):
            merged[-1] = last._replace(page=last.page + region.page)
        else:
            merged.append(region)
    return merged


def release_bounds(kv_cache_config: KVCacheConfig) -> tuple[int, int]:
    """Runs of blocks, and blocks, whose release does not delay a step noticeably."""
    found = regions(kv_cache_config)
    max_blocks = RELEASE_BYTES // max(1, sum(region.page for region in found))
    scattered = sum(region.page != region.stride for region in found)
    if scattered:  # A call a block.
        max_blocks = min(max_blocks, RELEASE_CALLS // scattered)
    return max(1, RELEASE_CALLS // max(1, len(found))), max(1, max_blocks)


def gib(num_bytes: int) -> str:
    """As the log and the errors say it; less than 1 GiB in MiB."""
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{num_bytes / (1 << 30):.2f} GiB"
