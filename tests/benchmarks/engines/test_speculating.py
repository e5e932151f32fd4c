"""How systems with draft tokens are started and asked: vLLM played by a few lines, and real."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.engines.speculating import make
from benchmarks.engines.speculating import vllm as engines
from benchmarks.engines.speculating.base import AUTO, DRAFT, NGRAM, NONE, Setup
from benchmarks.engines.vllm import environment
from benchmarks.lib.chain import ChainLlama, continuation, copying_prompts
from benchmarks.lib.llama import LlamaShape
from benchmarks.lib.worker_client import WorkerError

SHAPE = LlamaShape("tiny", 3, 128, 4, 2, 32, intermediate=256, vocabulary=512, dtype="float32")

PLAYED = """
import os

class Worker:
    def start(self, **request):
        assert os.path.exists(request["model"] + "/model.safetensors")
        assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
        self.asked = request
        return {"threads": 2, "openmp": "libgomp.so.1", "backends": [request["backend"]]}
    def turn(self, prompts, new, length):
        print(self.asked)
        outputs = [[length, str(self.asked)] for prompt in prompts]
        return {"seconds": 2.0, "tokens": 8, "steps": 4, "outputs": outputs}
"""


def setup(method: str, chain: ChainLlama) -> Setup:
    draft = chain.draft() if method == DRAFT else None
    shape = chain.shape
    return Setup(
        chain, draft, shape.dtype, method, 4, 2, 40, 16, 2 * shape.row_bytes, shape.weight_bytes
    )


@pytest.fixture
def chain() -> Iterator[ChainLlama]:
    model = ChainLlama(SHAPE, 512, epsilon=0.2)
    yield model
    model.close()


@pytest.fixture
def _played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    worker = tmp_path / "played_worker.py"
    worker.write_text(PLAYED)
    monkeypatch.setattr(engines, "WORKER", worker)
    return worker


@pytest.mark.usefixtures("_played")
@pytest.mark.parametrize(
    ("name", "mode", "method", "length", "words", "absent"),
    [
        ("cpu_attn", NONE, NGRAM, NONE, ["'speculative': None", "'additional': {}"], ["ngram"]),
        ("cpu_attn", "fixed", NGRAM, 3, ["'method': 'ngram'", "_tokens': 4"], ["draft_length"]),
        ("bmc_vllm", "fixed", DRAFT, 3, ["'attention_backend': 'BMC'"], ["ngram"]),
        ("bmc_vllm", AUTO, NGRAM, AUTO, ["'bmc': {'draft_length': 'auto'}"], ["draft_model"]),
    ],
)
def test_an_engine_asks_for_its_drafts(
    chain: ChainLlama, name: str, mode: str, method: str, length, words, absent
) -> None:
    engine = make(name, mode, bind="0-1")
    asked = setup(method, chain)
    engine.start(asked)
    assert (engine.threads, engine.openmp) == (2, "libgomp.so.1")
    turn = engine.turn([[1, 2]], 4, length)
    assert turn.tokens_per_second == 4.0
    number, told = turn.outputs[0]
    assert number == (length if mode == "fixed" else None)
    assert all(word in str(told) for word in words)
    assert not any(word in str(told) for word in absent)
    assert engine.start_bytes(asked) > asked.weight_bytes
    engine.close()
    engine.close()


def test_layers_that_attend_otherwise_are_refused(chain: ChainLlama, _played: Path) -> None:  # noqa: PT019
    _played.write_text(PLAYED.replace('[request["backend"]]', '["TORCH_SDPA"]'))
    engine = make("bmc_vllm", AUTO)
    with pytest.raises(WorkerError, match="attend with TORCH_SDPA; allowed: BMC"):
        engine.start(setup(NGRAM, chain))
    engine.close()


def test_what_a_system_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='auto' with cpu_attn; allowed: bmc_vllm"):
        make("cpu_attn", AUTO)
    with pytest.raises(ValueError, match="mode='auto' with dynamic; allowed: bmc"):
        make("dynamic", AUTO)
    with pytest.raises(ValueError, match="system 'onnx'; allowed: bmc_vllm"):
        make("onnx", NONE)


def test_the_openmp_runtime_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "libgomp" in environment("0", tmp_path)["LD_PRELOAD"]
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ImportError, match="libiomp5 is not at .*; pip install intel-openmp"):
        environment("0", tmp_path, "libiomp5")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    found = environment("0", tmp_path, "libiomp5")["LD_PRELOAD"]
    assert "libiomp5" in found
    assert "libgomp" not in found


@pytest.mark.engine
def test_a_real_engine_counts_its_drafts(chain: ChainLlama) -> None:
    """vLLM's own n-gram: the text is known, and so is the share that must be accepted."""
    engine = make("cpu_attn", "fixed", bind="0")
    prompts = copying_prompts(SHAPE.vocabulary, 2, 40, 0.8)
    try:
        engine.start(setup(NGRAM, chain))
        assert engine.openmp.startswith("libgomp")
        for _ in range(2):
            turn = engine.turn(prompts, 16, 3)
            assert turn.outputs == [continuation(SHAPE.vocabulary, one, 16) for one in prompts]
            assert 0 < turn.accepted < turn.examined <= turn.proposed
            assert turn.proposed <= 3 * turn.drafted_for <= 3 * 2 * turn.steps
            assert turn.tokens == 2 * turn.steps + turn.accepted
            assert 0 < turn.forward_seconds + turn.drafting_seconds < turn.seconds
    finally:
        engine.close()
