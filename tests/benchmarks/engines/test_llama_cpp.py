"""llama.cpp beside the others; the part that needs llama-cpp-python runs where it is named."""

import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.engines.base import Batch
from benchmarks.engines.llama_cpp import LlamaCpp, _save
from benchmarks.generate.cases import GenerateCase
from benchmarks.generate.run import Options, run
from benchmarks.lib.llama import TINY, RandomLlama
from benchmarks.lib.worker_client import WorkerError

PYTHON = os.environ.get("BMC_TEST_LLAMA_CPP_PYTHON")


def rotate_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """transformers: element i of `[..., head size]` is turned with element i + head size / 2."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def rotate_neighbors(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """GGUF's llama: element 2i is turned with element 2i + 1."""
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.stack(turned, -1).flatten(-2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("gguf")
    return folder, _save(RandomLlama(TINY, 64).module, folder)


def test_every_weight_has_its_gguf_name(saved: tuple[Path, list[str]]) -> None:
    folder, names = saved
    layer = ["attn_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    layer += [f"attn_{name}" for name in ("q", "k", "v", "output")]
    expected = {f"blk.{i}.{name}.weight" for i in range(TINY.layers) for name in layer}
    assert set(names) == expected | {"token_embd.weight", "output_norm.weight", "output.weight"}
    kinds = {name: np.load(folder / f"{name}.npy").dtype for name in names}
    for name, kind in kinds.items():
        assert kind == (np.float32 if "norm" in name else np.uint16), name


@pytest.mark.parametrize(("name", "heads"), [("q", TINY.heads), ("k", TINY.kv_heads)])
def test_rotary_pairs_are_neighbors(saved: tuple[Path, list[str]], name: str, heads: int) -> None:
    """Scores of rotated rows are what they were: the same pairs turn by the same angles."""
    model = RandomLlama(TINY, 64).module
    weight = getattr(model.model.layers[1].self_attn, f"{name}_proj").weight.float()
    array = np.load(saved[0] / f"blk.1.attn_{name}.weight.npy")
    permuted = torch.from_numpy(array).view(torch.bfloat16).float()
    x, y = torch.randn(2, TINY.hidden)
    angles = torch.rand(2, TINY.head_size // 2)

    def score(weight: torch.Tensor, rotate) -> torch.Tensor:
        rows = [
            rotate((weight @ v).view(heads, -1), a) for v, a in zip((x, y), angles, strict=True)
        ]
        return (rows[0] * rows[1]).sum(-1)

    torch.testing.assert_close(score(permuted, rotate_neighbors), score(weight, rotate_halves))


@pytest.mark.parametrize(
    ("python", "message"),
    [(sys.executable, "No module named '(gguf|llama_cpp)'"), ("/does/not/exist", "does not start")],
)
def test_an_interpreter_that_does_not_do_is_an_error(python: str, message: str) -> None:
    engine = LlamaCpp(Path(python), 1)
    with pytest.raises(WorkerError, match=f"--llama-cpp-python {python}: .*{message}"):
        engine.start(RandomLlama(replace(TINY, dtype="float32"), 64), Batch(1, 8, 8))
    engine.close()
    arguments = ["generate", "--batch=1", "--rows=40", "--systems=dynamic", "--rounds=2"]
    result = CliRunner().invoke(app, [*arguments, f"--llama-cpp-python={python}"])
    assert result.exit_code == 3
    assert re.search(message, " ".join(result.output.split()))


@pytest.mark.skipif(
    PYTHON is None,
    reason="compiles for minutes, so not part of the set-up; to run it: "
    "BMC_TEST_LLAMA_CPP_PYTHON=python of an environment with llama-cpp-python and gguf",
)
def test_llama_cpp_is_measured_and_right() -> None:
    """Greedy float32 tokens are those of DynamicCache, and a bfloat16 case is timed."""
    assert PYTHON is not None
    case = GenerateCase(2, 40)
    options = Options([case], 1, ("dynamic", "bmc"), 16, 2, TINY, Path(PYTHON))
    report = run(options)
    assert report.failures == []
    assert [row.system for row in report.rows] == ["dynamic", "bmc", "llama_cpp"]
    assert report.rows[2].peer
    assert math.isnan(report.rows[2].logits_error), "its own reference"
