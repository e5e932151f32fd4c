"""The worker of `operators/slabpool.py`: AMD's SlabPool, in the Python that has pace-vllm.

Run by `lib/worker_loop.py`, with nothing of this project importable: only torch and the compiled
library inside the package pace_vllm are used, neither vLLM nor the package's own start-up (which
asks for a range of vLLM versions).
"""

import importlib.metadata
import importlib.util
import time
from pathlib import Path


class Worker:
    """One case at a time: a pool per rotating set."""

    def __init__(self):
        import torch

        self.torch = torch
        spec = importlib.util.find_spec("pace_vllm")
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError("the package pace-vllm is not installed there")
        folder = Path(next(iter(spec.submodule_search_locations)))
        library = folder / "lib" / "libpace_cpp.so"
        if not library.exists():
            raise RuntimeError("its pace-vllm has no lib/libpace_cpp.so")
        torch.ops.load_library(str(library))
        self.no_sinks = torch.tensor([], dtype=torch.bfloat16)
        self.pools = []

    def hello(self):
        try:
            version = importlib.metadata.version("pace-vllm")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        return {"pace": version, "torch": self.torch.__version__}

    def prepare(self, inputs, sets, threads):
        torch = self.torch
        torch.set_num_threads(threads)
        self.pools = []
        data = torch.load(inputs, weights_only=True)
        self.query, self.key, self.value = data["query"], data["key"], data["value"]
        self.new_key, self.new_value = data["new_key"], data["new_value"]
        self.query_lens, self.stored = data["query_lens"], data["stored"]
        self.scale, self.is_write = data["scale"], data["is_write"]
        self.ids = list(range(len(self.query_lens)))
        _, heads, head_size = self.key.shape
        block = int(torch.ops.pace.slab_autotune_block_size(heads, head_size))
        rows = [n + new for n, new in zip(self.stored, self.query_lens, strict=True)]
        blocks = sum(-(-n // block) for n in rows) + len(rows)
        for _ in range(sets):
            pool = torch.classes.pace.SlabPool(blocks, heads, head_size, block)
            for seq, most in zip(self.ids, rows, strict=True):
                pool.create_sequence(seq, most)
            pool.cache_update(self.ids, self.key, self.value, self.stored)
            self.pools.append(pool)
        return {"block_size": block}

    def attend(self, pool):
        return pool.attention(
            self.ids, self.query, self.query_lens, [], self.scale, 0, self.no_sinks
        )

    def write(self, pool):
        pool.cache_update(self.ids, self.new_key, self.new_value, self.query_lens)

    def forget(self, pool):
        for seq, count in zip(self.ids, self.query_lens, strict=True):
            pool.truncate_sequence(seq, count)

    def call(self, index):
        pool = self.pools[index % len(self.pools)]
        start = time.perf_counter()
        if self.is_write:
            self.write(pool)
        else:
            self.attend(pool)
        seconds = time.perf_counter() - start
        if self.is_write:
            self.forget(pool)
        return {"seconds": seconds}

    def check(self, output):
        pool = self.pools[0]
        if self.is_write:
            self.write(pool)
        out = self.attend(pool)
        if self.is_write:
            self.forget(pool)
        self.torch.save(out.reshape(self.query.shape).clone(), output)
        return {}
