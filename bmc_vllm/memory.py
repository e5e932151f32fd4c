"""The KV pool's pages: reserved at start, resident when used, given back when asked.

vLLM allocates the pool with ``torch.zeros``, which on the CPU writes, and so makes resident, all
of it. Inside ``KVPoolMemory.allocation()`` that one call gets an anonymous private mapping
instead: the same zeros, but each page comes into being when it is first written, by the thread
that writes it (so that NUMA's first-touch rule applies to the compute threads).

Promises: a released page reads as zeros again; only whole pages inside the given blocks are
released. Knows nothing of which blocks are free: that is the scheduler's knowledge.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from bmc_core.machine.memory import PAGE, prefer_huge_pages

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


class _LazyZeros(TorchFunctionMode):
    """Answers ``torch.zeros(n, dtype=torch.int8)`` with the pool's mapping, once."""

    def __init__(self, memory: KVPoolMemory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            func is torch.zeros
            and self.memory.num_bytes == 0
            and len(args) == 1
            and isinstance(args[0], int)
            and kwargs.get("dtype") is torch.int8
            and args[0] > 0
        ):
            return self.memory.map(args[0])
        return func(*args, **kwargs)


class KVPoolMemory:
    """The mapping behind one worker's KV pool.

    Args:
        huge_pages: ask for huge pages. Attention reads them faster; less can be given back.
    """

    def __init__(self, *, huge_pages: bool = False) -> None:
        self._huge_pages = huge_pages
        self.num_bytes = 0
        self._mapping: mmap.mmap | None = None
        self._address = 0
        self._regions: list[tuple[int, int, int]] = []

    def allocation(self) -> TorchFunctionMode:
        """Context in which vLLM's allocation of the pool takes this mapping."""
        return _LazyZeros(self)

    def map(self, num_bytes: int) -> torch.Tensor:
        """An int8 tensor [num_bytes] of zeros, no page of it resident yet."""
        # NORESERVE: the pool may be larger than what is free now, as with any lazy allocation.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._mapping = mmap.mmap(-1, num_bytes, flags=flags)
        self.num_bytes = num_bytes
        tensor = torch.frombuffer(self._mapping, dtype=torch.int8)
        if self._huge_pages:
            prefer_huge_pages(tensor)
        self._address = tensor.data_ptr()
        return tensor

    def set_layout(self, kv_cache_config: KVCacheConfig) -> None:
        """Learns where each layer's blocks lie in the pool."""
        regions: set[tuple[int, int, int]] = set()
        for tensor in kv_cache_config.kv_cache_tensors:
            num_blocks = kv_cache_config.num_blocks
            # Layer-outermost: a layer is one dense region of blocks, or one for each head. Block-
            # outermost: the pages of all layers of a block lie side by side, layer_stride apart.
            region = tensor.block_stride * num_blocks
            dense = tensor.layer_stride >= region
            page = tensor.block_stride if dense else tensor.layer_stride
            for index in range(len(tensor.layers)):
                layer = tensor.offset + index * tensor.layer_stride
                for part in range(tensor.layer_stride // region if dense else 1):
                    regions.add((layer + part * region, tensor.block_stride, page))
        self._regions = sorted(regions)

    def release(self, block_ids: Iterable[int]) -> None:
        """Gives the pages that lie wholly inside the blocks back to the operating system.

        The caller guarantees that nobody needs the blocks' contents, now or later.
        """
        if self._mapping is None:
            return
        runs = list(_runs(sorted(block_ids)))
        for offset, stride, page in self._regions:
            for first, last in runs:
                if page == stride:
                    self._drop(offset + first * stride, offset + (last + 1) * stride)
                    continue
                for block_id in range(first, last + 1):
                    start = offset + block_id * stride
                    self._drop(start, start + page)

    def _drop(self, start: int, end: int) -> None:
        assert self._mapping is not None
        start = -(-start // PAGE) * PAGE
        end = min(end, self.num_bytes) // PAGE * PAGE
        if start < end:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def resident_bytes(self) -> int:
        """Bytes of the pool that are in memory; 0 where the system does not tell."""
        if self._mapping is None:
            return 0
        pages = -(-self.num_bytes // PAGE)
        states = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        address, length = ctypes.c_void_p(self._address), ctypes.c_size_t(self.num_bytes)
        if libc.mincore(address, length, states) != 0:
            return 0
        # Only the lowest bit of each byte is defined.
        return int((torch.frombuffer(states, dtype=torch.uint8) & 1).sum()) * PAGE


def _runs(ids: list[int]) -> Iterator[tuple[int, int]]:
    """First and last id of each run of consecutive ``ids`` (sorted)."""
    first = last = None
    for block_id in ids:
        if last is not None and block_id == last + 1:
            last = block_id
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = block_id
    if first is not None and last is not None:
        yield first, last
