"""What the pool benchmark measures: loads and schedulers. Plain data only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.lib.load import Load

QUICK = (
    Load("mixed", 32, 65536),
    Load("mixed, 128 requests", 128, 262144),
)
FULL = (
    *QUICK,
    Load("mixed, no prefix caching", 32, 65536, caching=False),
    Load("mixed, tight", 64, 65536),
    Load("conversations", 24, 65536, prefixes=0, turns=0.7),
)


@dataclass(frozen=True)
class System:
    """A scheduler.

    Attributes:
        name: in documents.
        title: in tables.
        block_size: rows.
        r: rows of a chunk; None: vLLM's own managers.
    """

    name: str
    title: str
    block_size: int
    r: int | None = None

    @property
    def chunk_blocks(self) -> int:
        return max(1, (self.r or self.block_size) // self.block_size)


STOCK = System("vllm", "vLLM, block 32", 32)
SYSTEMS = (
    System("bmc", "BMC, block 32, r 128", 32, 128),
    STOCK,
    System("vllm_128", "vLLM, block 128", 128),
)


def systems_for(block_size: int, r: int) -> tuple[System, ...]:
    """BMC as asked for, vLLM with the same blocks, and vLLM with its own."""
    bmc = replace(SYSTEMS[0], title=f"BMC, block {block_size}, r {r}", block_size=block_size, r=r)
    same = replace(STOCK, title=f"vLLM, block {block_size}", block_size=block_size)
    return (bmc, same) if block_size == 128 else (bmc, same, SYSTEMS[2])


@dataclass(frozen=True)
class Admission:
    """Requests that all wait at once: how many steps until the last has ended."""

    blocks: int
    block_size: int
    requests: int
    prompt: int
    outputs: int

    def __str__(self) -> str:
        return (
            f"{self.requests} requests of {self.prompt} + {self.outputs} tokens in "
            f"{self.blocks - 1} blocks of {self.block_size}"
        )


ADMISSIONS = (
    Admission(401, 32, 300, 20, 10),
    Admission(401, 32, 300, 30, 40),
    Admission(201, 16, 100, 16, 30),
    Admission(401, 32, 120, 60, 300),
    Admission(401, 32, 200, 100, 30),
)
"""Pools in which spare rows that are withheld would cost steps."""
