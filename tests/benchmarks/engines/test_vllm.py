"""How vLLM's engines are started and asked; vLLM itself is played by a few lines."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.engines import VLLM, Settings, make
from benchmarks.engines import vllm as engines
from benchmarks.engines.base import Batch
from benchmarks.engines.vllm import MARGIN, TREE, environment, pool_bytes
from benchmarks.lib.llama import MHA, TINY, RandomLlama
from benchmarks.lib.worker_client import WorkerError

PLAYED = """
import os

class Worker:
    def start(self, **request):
        assert os.path.exists(request["model"] + "/model.safetensors")
        self.asked = [dict(request, bind=os.environ["VLLM_CPU_OMP_THREADS_BIND"])]
        return {"threads": 2, "backends": [request["backend"]]}
    def empty(self):
        return {}
    def fill(self, **request):
        self.asked.append(request)
        return {}
    def steps(self, count):
        self.asked.append(count)
        return {"seconds": [0.5] * count}
    def logits(self, path):
        import torch
        torch.save(torch.ones(2, 512), path)
        return {}
    def result(self):
        return {"tokens": self.asked}
    def generate(self, prompts, new):
        return {"tokens": [prompt + [7] * new for prompt in prompts]}
"""


@pytest.fixture(params=VLLM)
def engine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[engines.VLLM]:
    worker = tmp_path / "played_worker.py"
    worker.write_text(PLAYED)
    monkeypatch.setattr(engines, "WORKER", worker)
    engine = make(request.param, Settings(bind="0-1", compile=True, drawn=False))
    assert isinstance(engine, engines.VLLM)
    yield engine
    engine.close()
    engine.close()


def test_an_engine_asks_for_its_backend_and_room(engine: engines.VLLM) -> None:
    model = RandomLlama(TINY, 64)
    largest = Batch(3, 20, 10)
    engine.start(model, largest)
    assert engine.threads == 2
    engine.fill(Batch(2, 15, 5))
    steps = engine.step(4)
    assert [step.seconds for step in steps] == [0.5] * 4
    assert torch.equal(engine.logits(), torch.ones(2, 512))
    started, filled, *counts = engine.tokens()
    assert started["backend"] == {"bmc_vllm": "BMC", "cpu_attn": "CPU_ATTN"}[engine.name]
    assert engine.peer == (engine.name == "cpu_attn")
    assert (started["dtype"], started["compile"], started["bind"]) == ("bfloat16", True, "0-1")
    assert started["rows"] == 20 + 10 + MARGIN
    assert started["pool_bytes"] == pool_bytes(TINY, largest)
    assert filled == {"batch": 2, "rows": 15, "new": 5 + MARGIN, "drawn": False}
    assert counts == [4]
    engine.empty()
    assert engine.generate(torch.tensor([[1, 2]]), 2).tolist() == [[1, 2, 7, 7]]
    model.close()


def test_an_engine_whose_layers_attend_otherwise_is_refused(engine: engines.VLLM) -> None:
    """vLLM may fall back to another backend than it was asked for."""
    worker = engines.WORKER.read_text()
    engines.WORKER.write_text(worker.replace('[request["backend"]]', '["TORCH_SDPA"]'))
    model = RandomLlama(TINY, 64)
    message = f"its layers attend with TORCH_SDPA; allowed: {engine.title}"
    with pytest.raises(WorkerError, match=message):
        engine.start(model, Batch(3, 20, 10))
    model.close()


def test_both_engines_get_the_same_environment(tmp_path: Path) -> None:
    found = environment("0-1", tmp_path)
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert "libgomp" in found["LD_PRELOAD"]
    assert found["PYTHONPATH"].split(":")[0] == str(TREE)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment("", tmp_path)


def test_the_pool_holds_the_batch_and_chunks_begun() -> None:
    assert pool_bytes(MHA, Batch(8, 2000, 100)) > 8 * (2100 + 512) * MHA.row_bytes
