"""What the kernel benchmark measures: attention cases, and the lists `quick` and `full`.

Promises plain data only. Knows nothing of operators, tensors and clocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["decode", "verification", "prefill", "mixed", "write"]

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FP8_CACHES = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""Quantized caches: vLLM's name, torch's dtype."""
TOLERANCE = {"bfloat16": 5e-3, "float16": 2e-3, "float32": 1e-4}
"""Largest ||out - reference|| / ||reference|| by dtype of the case."""
FP8_PEER_TOLERANCE = 7e-2
"""What a peer may be off over a quantized cache: CPU_ATTN's e4m3 is 4 to 5 % off even where the
cache can hold every value exactly. BMC is held to `TOLERANCE`."""


@dataclass(frozen=True)
class Case:
    """One timed call: attention of one layer over one step's batch, or the write of its new rows.

    Attributes:
        name: unique in a list; `--only` matches it.
        kind: what the figures are held against: reads (decode, verification), arithmetic
            (prefill, mixed), or another case (write).
        seq_lens: KV rows of each sequence, this step's rows included.
        query_lens: query rows of each sequence, the last rows of it.
        block_size: rows of a block; 0: each system's own default.
        table_factor: width of the block table over the width that is used.
        run_rows: rows that lie side by side before the next run lies elsewhere (the chunk size r
            of a scattered pool); 0: all blocks of the pool in order.
        threads: 0: those of the run.
        planning: the work done once per step (batch checks, split over threads) is inside the
            timed call; otherwise it is done before, as for every layer of a model but the first.
        group: cases of one group are timed alternately and compared with each other.
        cache: a key of `FP8_CACHES`; "": keys and values are kept in `dtype`.
    """

    name: str
    kind: Kind
    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_size: int
    dtype: str = "bfloat16"
    block_size: int = 0
    table_factor: int = 1
    run_rows: int = 0
    threads: int = 0
    planning: bool = False
    group: str = ""
    cache: str = ""

    @property
    def batch(self) -> int:
        return len(self.seq_lens)

    @property
    def rows(self) -> int:
        """KV rows of the longest sequence."""
        return max(self.seq_lens)

    @property
    def query_rows(self) -> int:
        """Query rows of the sequence that has most."""
        return max(self.query_lens)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's K and V."""
        element = 1 if self.cache else ELEMENT_BYTES[self.dtype]
        return self.kv_heads * self.head_size * 2 * element

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one call must read (or, for a write, must write)."""
        rows = sum(self.query_lens if self.kind == "write" else self.seq_lens)
        return rows * self.row_bytes

    @property
    def set_bytes(self) -> int:
        """Bytes of K and V of one rotating set."""
        return sum(self.seq_lens) * self.row_bytes

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products over the rows that a query may see."""
        if self.kind == "write":
            return 0
        seen = 0
        for rows, queries in zip(self.seq_lens, self.query_lens, strict=True):
            seen += queries * (rows - queries) + queries * (queries + 1) // 2
        return 4 * self.query_heads * self.head_size * seen

    @property
    def reads_bound(self) -> bool:
        """Whether the figure of merit is KV bytes per second; else FLOP per second."""
        return self.kind in ("decode", "verification")

    def tolerance(self, peer: bool) -> float:
        """Largest relative error allowed, of BMC or of a peer."""
        return FP8_PEER_TOLERANCE if peer and self.cache else TOLERANCE[self.dtype]

    @property
    def inputs_key(self) -> tuple[object, ...]:
        """Cases with the same key can share query, keys, values and reference."""
        return (
            self.seq_lens,
            self.query_lens,
            self.query_heads,
            self.kv_heads,
            self.head_size,
            self.dtype,
            self.cache,
        )


def uniform(
    kind: Kind,
    batch: int,
    query_heads: int,
    kv_heads: int,
    head_size: int,
    rows: int,
    query_rows: int = 1,
    *,
    dtype: str = "bfloat16",
) -> Case:
    """A batch of equal sequences."""
    name = f"{kind} {batch}x{rows}"
    if query_rows > 1:
        name += f" q{query_rows}"
    name += f" h{query_heads}/{kv_heads} d{head_size}"
    if dtype != "bfloat16":
        name += f" {dtype}"
    return Case(
        name,
        kind,
        (rows,) * batch,
        (query_rows,) * batch,
        query_heads,
        kv_heads,
        head_size,
        dtype,
    )


GQA = uniform("decode", 8, 32, 8, 128, 2048)
MHA = uniform("decode", 8, 32, 32, 64, 2048)
PREFILL = uniform("prefill", 1, 32, 8, 128, 2048, 2048)

_DECODES, _CHUNK = (2048,) * 7, (2048,)
_MIXED_NAME = "mixed 7 decodes + 512-row chunk"
MIXED = Case(_MIXED_NAME, "mixed", _DECODES + _CHUNK, (1,) * 7 + (512,), 32, 8, 128)


def quick_cases() -> list[Case]:
    """Those that goals are stated for."""
    half_ways = [
        replace(case, name=f"{case.name} {dtype}", dtype=dtype)
        for dtype in ("float32", "float16")
        for case in (GQA, MHA)
    ]
    quantized = [
        replace(case, name=f"{case.name} {cache}", cache=cache)
        for cache, case in (("fp8_e4m3", GQA), ("fp8_e4m3", MHA), ("fp8_e5m2", MHA))
    ]
    return [
        GQA,
        MHA,
        uniform("decode", 1, 32, 8, 128, 8192),
        uniform("decode", 1, 32, 1, 128, 16384),
        uniform("verification", 8, 32, 8, 128, 2048, 5),
        uniform("verification", 8, 32, 8, 128, 2048, 9),
        uniform("decode", 16, 32, 8, 64, 512),
        PREFILL,
        uniform("prefill", 1, 32, 8, 128, 8192, 512),
        MIXED,
        *half_ways,
        *quantized,
        replace(GQA, name="write 8x1 h32/8 d128", kind="write"),
        replace(MHA, name="write 8x1 h32/32 d64", kind="write"),
    ]


def shape_cases() -> list[Case]:
    """More shapes of the same kernels."""
    return [
        uniform("decode", 1, 32, 8, 128, 2048),
        uniform("decode", 1, 16, 4, 128, 512),
        uniform("decode", 4, 8, 8, 256, 2048),
        uniform("verification", 8, 32, 32, 64, 2048, 5),
        uniform("verification", 1, 32, 8, 128, 8192, 9),
        uniform("prefill", 1, 32, 32, 64, 2048, 2048),
        replace(PREFILL, name=f"{PREFILL.name} float32", dtype="float32"),
        _ragged("decode ragged 8x256..16384 h32/8 d128"),
    ]


def _ragged(name: str) -> Case:
    """Sequences of very different lengths: the longest must not run alone on one thread."""
    lens = (16384, 4096, 2048, 1024, 512, 256, 256, 256)
    return Case(name, "decode", lens, (1,) * len(lens), 32, 8, 128)


def width_cases() -> list[Case]:
    """Block tables that are wider than what is used of them."""
    group = "width of the block table"
    return [
        replace(
            GQA,
            name=f"width {factor}x",
            table_factor=factor,
            planning=True,
            group=group,
        )
        for factor in (1, 2, 4, 8, 16)
    ]


def layout_cases() -> list[Case]:
    """The pool's blocks in order, in scattered chunks of r rows, and scattered one by one."""
    cases = []
    for block_size, runs in ((32, (32, 128, 512, 0)), (128, (128, 512, 0))):
        for run in runs:
            cases.append(
                replace(
                    GQA,
                    name=f"layout b{block_size} " + (f"r{run}" if run else "in order"),
                    block_size=block_size,
                    run_rows=run,
                    group=f"r and scatter, blocks of {block_size} rows",
                )
            )
    return cases


def thread_cases(threads: int) -> list[Case]:
    """The same work on 1 to `threads` threads (at most 8 counts of them)."""
    counts = sorted({max(1, round(threads * i / 8)) for i in range(1, 9)} | {1, threads})
    cases = []
    for case in (GQA, PREFILL, MIXED):
        for count in counts:
            cases.append(
                replace(
                    case,
                    name=f"threads {count}: {case.name}",
                    threads=count,
                    group=f"threads, {case.name}",
                )
            )
    return cases


def mixed_parts() -> list[Case]:
    """The mixed batch and its two halves: together they should cost what they cost apart."""
    group = "mixed batch and its parts"
    return [
        replace(MIXED, name="parts: both", group=group),
        replace(
            MIXED, name="parts: decodes", seq_lens=_DECODES, query_lens=(1,) * 7, group=group,
            kind="decode",
        ),
        replace(
            MIXED, name="parts: chunk", seq_lens=_CHUNK, query_lens=(512,), group=group,
            kind="prefill",
        ),
    ]  # fmt: skip


def select(
    which: str, threads: int, only: str | None = None, dtype: str | None = None
) -> list[Case]:
    """The cases of a run.

    Args:
        which: `quick` or `full`.
        threads: those of the run; for the cases with fewer.
        only: regular expression that a name must contain; if no quick case has it, the full list
            is searched.
        dtype: every case in this dtype; one that is not of it says so in its name.

    Raises:
        ValueError: no case is left, `which` is unknown, or `only` is no regular expression.
    """
    if which not in ("quick", "full"):
        raise ValueError(f"--cases is {which!r}; allowed: quick, full")
    cases = quick_cases()
    if which == "full":
        cases += [*shape_cases(), *width_cases(), *layout_cases(), *mixed_parts()]
        cases += thread_cases(threads)
    if dtype is not None:
        cases = _in_dtype(cases, dtype)
    if only is not None:
        try:
            pattern = re.compile(only)
        except re.error as error:
            raise ValueError(f"--only is {only!r}, no regular expression: {error}") from None
        names = [case.name for case in cases]
        cases = [case for case in cases if pattern.search(case.name)]
        if not cases and which == "quick":
            return select("full", threads, only, dtype)
        if not cases:
            raise ValueError(f"--only is {only!r}; allowed: part of one of {names}")
    return cases


def _in_dtype(cases: Iterable[Case], dtype: str) -> list[Case]:
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"--dtype is {dtype!r}; allowed: {', '.join(ELEMENT_BYTES)}")
    stated: dict[tuple[object, ...], Case] = {}
    for case in cases:
        same = case
        if case.dtype != dtype:
            same = replace(case, dtype=dtype, name=f"{case.name} {dtype}")
        layout = (same.table_factor, same.block_size, same.run_rows, same.threads)
        key = (same.kind, same.group, same.inputs_key, layout)
        if key not in stated or case.dtype == dtype:
            stated[key] = same
    return list(stated.values())


def batches(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases in the order of measuring; those of one group together."""
    groups: dict[str, list[Case]] = {}
    for index, case in enumerate(cases):
        groups.setdefault(case.group or f"#{index}", []).append(case)
    return list(groups.values())
