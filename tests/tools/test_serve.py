"""What `make serve` chooses where the user has not."""

import json
from pathlib import Path

import pytest

from tools import serve


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "allowed_cpus", lambda: [0, 1])
    monkeypatch.setattr(serve, "physical_cores", lambda cpus: cpus)
    monkeypatch.setattr(serve, "available_bytes", lambda: 20 << 30)


def test_few_cores_all_compute(two_cores: None) -> None:
    environment: dict[str, str] = {}
    serve.choose_settings(environment, ["--max-model-len", "2048"])
    assert environment == {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "0,1"}


@pytest.mark.parametrize("option", ["--tensor-parallel-size=2", "-dp", "--data-parallel-size"])
def test_several_workers_share_them(two_cores: None, option: str) -> None:
    """One list would leave the second worker none."""
    environment: dict[str, str] = {}
    serve.choose_settings(environment, [option, "2"])
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "auto"


def test_what_is_set_stays(two_cores: None) -> None:
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "1"}
    serve.choose_settings(environment, ["-tp", "2"])
    assert environment == {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "1"}


def test_ngram_speculation_needs_no_model_of_its_own() -> None:
    name, config = serve.speculation_arguments("ngram")
    assert name == "--speculative-config"
    assert json.loads(config)["num_speculative_tokens"] == 16
    assert json.loads(config)["method"] == "ngram"
    assert serve.speculation_arguments("") == []


def test_a_draft_is_the_demo_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serve.demo_model, "ensure", lambda: tmp_path)
    _, config = serve.speculation_arguments("draft")
    assert json.loads(config) == {
        "method": "draft_model",
        "model": str(tmp_path / "draft"),
        "num_speculative_tokens": 8,
    }
