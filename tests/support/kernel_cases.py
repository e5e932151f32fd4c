"""Tiny cases and runs of the kernel benchmark."""

from typing import Any

from benchmarks.kernel.cases import Case
from benchmarks.kernel.run import Options, Report, run
from benchmarks.lib.goals import Goal


def tiny_case(name: str = "tiny", **fields: Any) -> Case:
    defaults: dict[str, Any] = {
        "kind": "decode",
        "seq_lens": (70, 40),
        "query_lens": (1, 1),
        "query_heads": 4,
        "kv_heads": 2,
        "head_size": 64,
    }
    return Case(name, **{**defaults, **fields})


TINY_CASES = [
    tiny_case("decode"),
    tiny_case("float32", dtype="float32"),
    tiny_case("float16", dtype="float16"),
    tiny_case("verification", kind="verification", query_lens=(5, 3)),
    tiny_case("prefill", kind="prefill", seq_lens=(64,), query_lens=(64,)),
    tiny_case("chunk", kind="prefill", seq_lens=(96,), query_lens=(32,)),
    tiny_case("mixed", kind="mixed", seq_lens=(70, 70, 64), query_lens=(1, 1, 33)),
    tiny_case("write", kind="write"),
    tiny_case("many heads per KV head", query_heads=32, kv_heads=1),
    tiny_case("width 1", planning=True, group="width"),
    tiny_case("width 4", planning=True, group="width", table_factor=4),
    tiny_case("scatter", block_size=32, run_rows=64, group="scatter"),
    tiny_case("thread 1", threads=1, group="threads"),
]

TINY_GOALS = [
    Goal("decode", "read_share", 1e-9),
    Goal("decode", "ratio", 1e9, against="CPU_ATTN"),
    Goal("decode", "cost", 9, at_most=True, against="x"),
    Goal("write", "cost", 1e9, at_most=True, against="decode"),
    Goal("width", "spread", 1e9, at_most=True),
]


def tiny_run(cases: list[Case], **fields: Any) -> Report:
    sizes: dict[str, Any] = {
        "threads": 2,
        "seconds": 0.0,
        "min_rounds": 5,
        "sets_bytes": 1 << 18,
        "read_bytes": 1 << 20,
        "gemm_size": 128,
        "goals": TINY_GOALS,
    }
    return run(Options(cases=cases, **{**sizes, **fields}))
