"""What speculation needs is set, and what does not run is refused by name, before models load."""

import os

import pytest
from vllm.config import VllmConfig
from vllm.config import vllm as vllm_config_module
from vllm.engine.arg_utils import EngineArgs

from bmc_vllm import metrics
from tests.support.engines import engine
from tests.support.models import ModelStore

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}


def config_of(model: str, **settings: object) -> VllmConfig:
    given = {"skip_tokenizer_init": True, "max_model_len": 256, "attention_backend": "BMC"}
    return EngineArgs(model=model, **{**given, **settings}).create_engine_config()


def drafting(model_dir: ModelStore, **settings: object) -> dict[str, object]:
    model = model_dir("llama-draft")
    return {"method": "draft_model", "model": model, "num_speculative_tokens": 3, **settings}


def test_methods_that_are_refused(model_dir: ModelStore) -> None:
    speculative = {**NGRAM, "method": "ngram_gpu"}
    with pytest.raises(ValueError, match="method='ngram_gpu': it needs a GPU .* allowed: ngram, "):
        config_of(model_dir("llama-gqa"), speculative_config=speculative)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("lfm2-hybrid", {}, "layers with a state: .* allowed: models with attention layers only"),
        ("llama-gqa", {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 .* allowed: 1"),
        (
            "llama-gqa",
            {"additional_config": {"bmc": {"prompt_lookup_max": 3}}},
            r"\['prompt_lookup_max'\]=3 with method='ngram': .* allowed: method 'draft_model'",
        ),
    ],
)
def test_refused_with_speculation(
    model_dir: ModelStore, model: str, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(model_dir(model), speculative_config=NGRAM, **settings)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_numbers_of_an_engine_that_speculates_are_shown(
    model_dir: ModelStore, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(metrics, "publish", lambda config: shown.append(config.instance_id))
    speculative = NGRAM if method == "ngram" else drafting(model_dir)
    config = config_of(model_dir("llama-gqa"), speculative_config=speculative)
    assert config.instance_id in shown


def test_more_draft_tokens_than_a_request_has_rows(model_dir: ModelStore) -> None:
    message = "num_speculative_tokens=256 with max_model_len=256: .* allowed: 1 to 255"
    speculative = {**NGRAM, "num_speculative_tokens": 256}
    with pytest.raises(ValueError, match=message):
        config_of(model_dir("llama-gqa"), speculative_config=speculative)


def test_copied_drafts_without_speculation(model_dir: ModelStore) -> None:
    message = r"\['prompt_lookup_max'\]=3 without speculative_config: .*\"method\": \"ngram\""
    with pytest.raises(ValueError, match=message):
        config_of(model_dir("llama-gqa"), additional_config={"bmc": {"prompt_lookup_max": 3}})


def test_copied_drafts_have_no_probabilities(model_dir: ModelStore) -> None:
    with pytest.raises(ValueError, match="draft_sample_method='probabilistic'.* allowed: 'greedy'"):
        config_of(
            model_dir("llama-gqa"),
            speculative_config=drafting(model_dir, draft_sample_method="probabilistic"),
            additional_config={"bmc": {"prompt_lookup_max": 3}},
        )


def test_layers_of_several_kinds(model_dir: ModelStore) -> None:
    message = "'draft_model': the draft's 4 attention layers lie in 2 KV cache groups.*'ngram'"
    speculative = drafting(model_dir, model=model_dir("gemma2"))
    with (
        pytest.raises(ValueError, match=message),
        engine(model_dir("gemma2"), "BMC", speculative_config=speculative),
    ):
        pass


def test_a_second_runner_that_was_asked_for(
    model_dir: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1 .* allowed: .*=0, or unset"):
        config_of(model_dir("llama-gqa"), speculative_config=drafting(model_dir))


def test_the_first_runner_where_vllm_would_take_the_second(
    model_dir: ModelStore, monkeypatch: pytest.MonkeyPatch, vllm_log: list[str]
) -> None:
    """As with a Triton that works on CPUs."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")  # put back at the end
    del os.environ["VLLM_USE_V2_MODEL_RUNNER"]
    monkeypatch.setattr(vllm_config_module, "HAS_TRITON", True)
    assert config_of(model_dir("llama-gqa")).use_v2_model_runner, "without speculation: vLLM's"
    config = config_of(model_dir("llama-gqa"), speculative_config=drafting(model_dir))
    assert not config.use_v2_model_runner
    (line,) = [line for line in vllm_log if "first model runner" in line]
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_max": 0}, r"'prompt_lookup_max'\]=0: expected a positive int"),
        ({"prompt_lookup_max": True}, r"'prompt_lookup_max'\]=True: expected a positive int"),
        (
            {"prompt_lookup_max": 2, "prompt_lookup_min": 3},
            r"'prompt_lookup_min'\]=3: expected at most prompt_lookup_max \(2\)",
        ),
        ({"prompt_lookup_min": 3}, r"'prompt_lookup_min'\]=3: expected at most .*\(None\)"),
    ],
)
def test_settings_of_copied_drafts(model_dir: ModelStore, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(
            model_dir("llama-gqa"),
            speculative_config=drafting(model_dir),
            additional_config={"bmc": settings},
        )
