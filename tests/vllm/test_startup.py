"""The line at the start says what was built: layers by backend, KV cache groups by growth."""

from vllm import LLM

from tests.support.engines import engine
from tests.support.models import ModelStore


def start_lines(log: list[str]) -> list[str]:
    return [line for line in log if line.startswith("BMC: attention backend")]


def test_start_line(model_dir: ModelStore, vllm_log: list[str]) -> None:
    with engine(
        model_dir("llama-gqa"), "BMC", dtype="bfloat16", additional_config={"bmc": {"r": 64}}
    ) as llm:
        assert isinstance(llm, LLM)
    (start,) = start_lines(vllm_log)
    for part in (
        "BMC for 2 of 2 layers; ",
        "1 of 1 KV cache groups in chunks of r=64 rows; ",
        "instruction set ",
        "dtype bfloat16",
        "block size 32 rows",
        "threads",
    ):
        assert part in start


def test_start_line_with_a_stock_scheduler(model_dir: ModelStore, vllm_log: list[str]) -> None:
    stock = "vllm.v1.core.sched.scheduler.Scheduler"
    with engine(model_dir("gemma2"), "BMC", scheduler_cls=stock) as llm:
        assert isinstance(llm, LLM)
    (start,) = start_lines(vllm_log)
    assert "BMC for 4 of 4 layers; " in start
    assert "; 0 of 2 KV cache groups in chunks, " in start
    assert "1 block by block (full attention)" in start
    assert "1 block by block (sliding window)" in start


def test_start_line_where_a_kind_of_layers_has_another_backend(
    model_dir: ModelStore, vllm_log: list[str]
) -> None:
    per_kind = {"sliding_window": "CPU_ATTN"}
    config = {"backend": "BMC", "backend_per_kind": per_kind}
    with engine(model_dir("gemma2"), None, attention_config=config) as llm:
        assert isinstance(llm, LLM)
    (start,) = start_lines(vllm_log)
    assert "BMC for 2 of 4 layers, CPU_ATTN for 2 (as selected); " in start
    assert (
        "1 of 2 KV cache groups in chunks of r=128 rows, 1 block by block (sliding window); "
    ) in start
