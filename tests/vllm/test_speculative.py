"""Speculative decoding: verification batches give the tokens of plain greedy decoding."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bmc_vllm.drafters.calibration import measured_costs
from tests.support.engines import engine, flush, generate, scheduler, worker
from tests.support.models import ModelStore
from tests.support.steering import Steering

# Repetitive, so that the n-gram proposer finds something to propose.
PROMPTS = [[1, 2, 3, 4] * 10, list(range(5, 45)) * 2, [7]]


@pytest.fixture(scope="module")
def expected(model_dir: ModelStore) -> list[list[int]]:
    with engine(model_dir("llama-gqa"), "CPU_ATTN") as llm:
        return generate(llm, PROMPTS)


def backends(llm) -> dict[str, set[str]]:
    layers = worker(llm).compilation_config.static_forward_context.items()
    found: dict[str, set[str]] = {}
    for name, layer in layers:
        # Both models' layers share one namespace; vLLM prefixes the draft's.
        owner = "draft" if name.startswith("draft_model.") else "target"
        found.setdefault(owner, set()).add(layer.attn_backend.get_name())
    return found


NGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tests.support.engines import engine, flush, generate
speculative = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
settings = {"bmc": {"r": 64}}
with engine(sys.argv[2], "BMC", speculative_config=speculative, additional_config=settings) as llm:
    tokens = generate(llm, json.loads(sys.argv[3]))
    flush(llm)
print("RESULT " + json.dumps(tokens))
"""


def test_ngram(model_dir: ModelStore, expected: list[list[int]]) -> None:
    # In an interpreter of its own: the proposer imports numba, after which vLLM 0.32 cannot
    # build another engine in the same process (its kernel dispatcher trips over llvmlite).
    here = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", NGRAM, here, model_dir("llama-gqa"), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert json.loads(line.removeprefix("RESULT ")) == expected


DRAFT_LAYER = "draft_model.model.layers.0.self_attn.attn"


@pytest.mark.parametrize(
    ("draft", "named", "runs_on", "loss"),
    [
        ("llama-draft", None, "BMC", None),
        ("llama-draft", "BMC", "BMC", None),
        ("llama-draft", "CPU_ATTN", "CPU_ATTN", f"layer {DRAFT_LAYER} on CPU_ATTN: "),
        # Twice the KV heads: no setting of ours makes its blocks like the target's.
        ("llama-mha", None, "BMC", f"{DRAFT_LAYER} differ in the shape of their blocks: "),
    ],
    ids=["inherits", "named", "other-backend", "other-shape"],
)
def test_draft_model(
    model_dir: ModelStore,
    expected: list[list[int]],
    vllm_log: list[str],
    draft: str,
    named: str | None,
    runs_on: str,
    loss: str | None,
) -> None:
    """The draft runs where the target does unless it names a backend, and no layer costs the
    target its layout in silence."""
    speculative = {
        "method": "draft_model",
        "model": model_dir(draft),
        "num_speculative_tokens": 3,
        "attention_backend": named,
    }
    with engine(
        model_dir("llama-gqa"),
        "BMC",
        speculative_config=speculative,
        additional_config={"bmc": {"r": 64}},
    ) as llm:
        assert generate(llm, PROMPTS) == expected
        assert backends(llm) == {"target": {"BMC"}, "draft": {runs_on}}
        layout = worker(llm).cache_config.kv_cache_layout
        assert layout == ("LHBNC" if loss is None else "LBHNC")
        assert scheduler(llm).growth_stats().growths > 0
        flush(llm)
    handed_down = [line for line in vllm_log if "names no attention_backend" in line]
    assert len(handed_down) == (named is None)
    lost = [line for line in vllm_log if "the KV pool's layout is" in line]
    assert len(lost) == (loss is not None)
    assert all(loss in line for line in lost)


@pytest.mark.parametrize(
    ("method", "target", "draft", "settings"),
    [
        ("eagle3", "llama-gqa", "llama-eagle3", {}),
        ("mtp", "mimo-mtp", None, {}),
        ("medusa", "llama-gqa", "medusa", {}),
        ("draft_model", "llama-gqa", "llama-pard", {"parallel_drafting": True}),
    ],
    ids=["eagle3", "mtp", "medusa", "pard"],
)
def test_methods(
    model_dir: ModelStore,
    expected: list[list[int]],
    method: str,
    target: str,
    draft: str | None,
    settings: dict[str, Any],
) -> None:
    """Any number of drafting steps that the scheduler asks for, none included; methods with a
    fixed one keep it."""
    if target != "llama-gqa":
        with engine(model_dir(target), "CPU_ATTN") as llm:
            expected = generate(llm, PROMPTS)
    speculative = {"method": method, "num_speculative_tokens": 3, **settings}
    if draft is not None:
        speculative["model"] = model_dir(draft)
    fixed_length = {"bmc": {"draft_length": "fixed"}}
    with engine(
        model_dir(target), "BMC", speculative_config=speculative, additional_config=fixed_length
    ) as llm:
        costs = measured_costs(worker(llm).model_runner)
        assert costs is not None
        assert costs.draft
        assert all(seconds > 0 for _, seconds in costs.draft)
        steering = Steering(llm, lambda step: (3, 1, 0, 2)[step % 4])
        assert generate(llm, PROMPTS) == expected
        flush(llm)
    verified = {drafted for _, _, drafted, _ in steering.drafts}
    fixed = method == "medusa" or settings
    assert max(verified) == 3
    assert fixed or {1, 2} <= verified


def test_eagle_head(model_dir: ModelStore, expected: list[list[int]]) -> None:
    head = model_dir("llama-eagle")
    speculative = {"method": "eagle", "model": head, "num_speculative_tokens": 3}
    with engine(model_dir("llama-gqa"), "BMC", speculative_config=speculative) as llm:
        assert generate(llm, PROMPTS) == expected
        layers = worker(llm).compilation_config.static_forward_context.values()
        assert [layer.attn_backend.get_name() for layer in layers] == ["BMC"] * 3
        assert worker(llm).cache_config.kv_cache_layout == "LHBNC"
        flush(llm)
