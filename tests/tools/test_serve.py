"""What `make serve` chooses where the user has not."""

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
