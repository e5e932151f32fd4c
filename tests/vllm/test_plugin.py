"""States of the plugin: active, not selected, stepping aside, next to a rival."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.platforms import builtin_platform_plugins, resolve_current_platform_cls_qualname

from bmc_vllm import plugin
from tests.support.models import ModelStore

BMC = "bmc_vllm.platform.BMCPlatform"
CPU = plugin.builtin_platform()


def aside_lines(vllm_log: list[str]) -> list[str]:
    return [line for line in vllm_log if line.startswith("bmc-llm steps aside")]


def test_active(vllm_log: list[str]) -> None:
    assert resolve_current_platform_cls_qualname() == BMC
    assert not aside_lines(vllm_log)


@pytest.mark.parametrize("version", ["0.30.2", "0.33.0", "1.0", "dev", "0.33.0rc1+cpu"])
def test_unsupported_version(
    version: str, vllm_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)
    assert resolve_current_platform_cls_qualname() == CPU
    (line,) = aside_lines(vllm_log)
    assert version in line
    assert plugin.TESTED_VLLM in line


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1+cpu", "0.32.0rc2.dev3+gabc.cpu"])
def test_supported_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)
    assert plugin.register() == BMC


def test_not_a_cpu_build(vllm_log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(builtin_platform_plugins, "cpu", lambda: None)
    assert plugin.register() is None
    (line,) = aside_lines(vllm_log)
    assert "not a CPU build" in line


def test_native_module_missing(vllm_log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmc_core.native.load_error", lambda: "no such file: _native")
    assert resolve_current_platform_cls_qualname() == CPU
    (line,) = aside_lines(vllm_log)
    assert "no such file: _native" in line


def test_core_missing(vllm_log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import bmc_core

    monkeypatch.delattr(bmc_core, "native", raising=False)
    monkeypatch.setitem(sys.modules, "bmc_core.native", None)
    assert resolve_current_platform_cls_qualname() == CPU
    assert len(aside_lines(vllm_log)) == 1


def test_never_raises(vllm_log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("broken check")

    monkeypatch.setattr(plugin, "vllm_version", broken)
    assert plugin.register() is None
    (line,) = aside_lines(vllm_log)
    assert "broken check" in line


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Runs ``code`` in a fresh interpreter of this environment; returns its last line."""
    env = {**os.environ, **environment}
    env["PYTHONPATH"] = os.pathsep.join(
        part for part in (environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")) if part
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sys.stderr.write(done.stderr)
    return done.stdout + done.stderr


def make_rival(folder: Path, answer: str) -> None:
    """Another platform plugin, as pip would have installed it."""
    (folder / "rival_platform.py").write_text(f"def register():\n    return {answer}\n")
    info = folder / "rival_platform-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival-platform\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nrival = rival_platform:register\n"
    )


RESOLVE = (
    "from vllm.platforms import resolve_current_platform_cls_qualname as resolve\n"
    "print('PLATFORM', resolve())"
)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("answer", "plugins", "platform"),
    [
        ("'vllm.platforms.cpu.CpuPlatform'", None, "vllm.platforms.cpu.CpuPlatform"),
        ("'vllm.platforms.cpu.CpuPlatform'", "bmc", BMC),
        ("None", None, BMC),
    ],
)
def test_two_platform_plugins(
    tmp_path: Path, answer: str, plugins: str | None, platform: str
) -> None:
    make_rival(tmp_path, answer)
    chosen = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    output = run_python(RESOLVE, PYTHONPATH=str(tmp_path), **chosen)
    assert f"PLATFORM {platform}\n" in output
    told = "'rival'" in output and "set VLLM_PLUGINS=bmc" in output
    assert told == (platform != BMC)


STEPPED_ASIDE = """
import sys
from bmc_vllm import plugin
plugin.vllm_version = lambda: "0.99.0"
from vllm.engine.arg_utils import EngineArgs
try:
    EngineArgs(model=sys.argv[1], attention_backend="BMC").create_engine_config()
except ValueError as error:
    print("ERROR", error)
"""


def test_selected_but_stepped_aside(model_dir: ModelStore) -> None:
    """An error, not silently the stock backend; the reason stands in the log before it."""
    output = run_python(STEPPED_ASIDE, model_dir("llama-gqa"))
    assert "BMC" in output[output.index("ERROR") :]
    assert "steps aside" in output
    assert "0.99.0" in output


NOT_SELECTED = """
import hashlib, json, os, sys
import vllm.platforms
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
          max_model_len=256, kv_cache_memory_bytes=32 << 20)
params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": list(range(1, n))} for n in (5, 40, 140)]
tokens = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
core = llm.llm_engine.engine_core.engine_core
config = llm.llm_engine.vllm_config
worker = core.model_executor.driver_worker.worker
layer = next(iter(config.compilation_config.static_forward_context.values()))
from prometheus_client import REGISTRY
name = lambda x: f"{type(x).__module__}.{type(x).__qualname__}"
pool = core.scheduler.kv_cache_manager.coordinator
print("RESULT " + json.dumps({
    "tokens": tokens,
    "platform base": vllm.platforms.current_platform.__class__.__mro__[-3].__qualname__,
    "worker": name(worker), "runner": name(worker.model_runner), "scheduler": name(core.scheduler),
    "managers": [name(m) for m in pool.single_type_managers],
    "specs": [repr(g.kv_cache_spec) for g in core.scheduler.kv_cache_config.kv_cache_groups],
    "backend": layer.attn_backend.full_cls_name(), "impl": name(layer.impl),
    "block size": config.cache_config.block_size,
    "hash": config.compute_hash(),
    "metrics": sorted(m.name for m in REGISTRY.collect() if not m.name.startswith("vllm")),
    "variables": sorted(k for k in os.environ if k.startswith("BMC")),
}))
"""


def test_not_selected_is_stock(model_dir: ModelStore) -> None:
    """With the plugin installed and BMC not selected: same classes, same tokens, same metrics."""
    results = []
    for environment in ({}, {"VLLM_PLUGINS": ""}):
        output = run_python(NOT_SELECTED, model_dir("llama-gqa"), **environment)
        line = next(line for line in output.splitlines() if line.startswith("RESULT "))
        results.append(json.loads(line.removeprefix("RESULT ")))
    assert results[0] == results[1]
    assert results[0]["backend"][1] == "CPUAttentionBackend"
