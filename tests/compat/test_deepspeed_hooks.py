"""What `bmc_deepspeed` leans on in DeepSpeed 0.19 beyond its documented interface.

One test per hook: when DeepSpeed moves it, the test that fails says which file of `bmc_deepspeed`
to open. `patches/README.md` says what each would be replaced by.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import pytest
import torch
from deepspeed import module_inject
from deepspeed.inference.config import DeepSpeedInferenceConfig as StockConfig
from deepspeed.inference.engine import InferenceEngine as StockEngine
from deepspeed.module_inject import DSPolicy
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

import bmc_deepspeed
from bmc_deepspeed import hooks
from bmc_deepspeed.config import BMCPolicyConfig

ROOT = Path(__file__).resolve().parents[2]

REMEMBER = """
import sys

def names():
    return {
        (module, name): id(value)
        for module, loaded in list(sys.modules.items())
        if module.split(".")[0] in ("deepspeed", "transformers", "torch") and loaded is not None
        for name, value in list(vars(loaded).items())
        # What is loaded, when its parent is asked for it, is no change of behavior.
        if not name.startswith("__") and type(value).__name__ not in ("module", "_LazyModule")
    }
"""


def run(script: str) -> str:
    """Output of a script in a Python of its own, where nothing of ours is imported yet."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.engine
def test_hooks_two_names_are_rebound_and_nothing_else() -> None:
    """hooks.py: an import changes two names of DeepSpeed, and nothing in transformers or torch."""
    out = run(
        REMEMBER
        + """
import deepspeed, transformers, transformers.generation, torch
import transformers.models.llama.modeling_llama
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
attention = sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())
defaults = deepspeed.default_inference_config()
before = names()
import bmc_deepspeed
after = names()
print(sorted(".".join(key) for key in before if after.get(key) != before[key]))
print(sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()) == attention)
print(deepspeed.default_inference_config() == defaults)
"""
    )
    changed, attention, defaults = out.splitlines()[-3:]
    assert changed == "['deepspeed.DeepSpeedInferenceConfig', 'deepspeed.InferenceEngine']"
    assert (attention, defaults) == ("True", "True")


def test_hooks_init_inference_looks_its_classes_up_when_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """hooks.py: `from deepspeed import init_inference` before our import works too."""
    made: list[object] = []
    monkeypatch.setattr(deepspeed, "DeepSpeedInferenceConfig", lambda **settings: settings)
    monkeypatch.setattr(
        deepspeed, "InferenceEngine", lambda model, config: made.append((model, config))
    )
    deepspeed.init_inference("model", kv_policy="bmc")  # type: ignore[arg-type]
    assert made == [("model", {"kv_policy": "bmc"})]


def test_hooks_are_installed_once() -> None:
    """hooks.py: our classes are one step away from DeepSpeed's, however often we install."""
    hooks.install()
    assert deepspeed.InferenceEngine.__bases__ == (StockEngine,)
    assert deepspeed.DeepSpeedInferenceConfig.__bases__ == (StockConfig,)
    assert deepspeed.InferenceEngine.__name__ == StockEngine.__name__
    assert deepspeed.DeepSpeedInferenceConfig.__name__ == StockConfig.__name__


@pytest.mark.engine
def test_hooks_step_aside_outside_the_tested_versions() -> None:
    """hooks.py: an unknown DeepSpeed stays as it is, and refuses kv_policy as it does today."""
    out = run(
        """
        import deepspeed, pydantic
        stock = deepspeed.InferenceEngine, deepspeed.DeepSpeedInferenceConfig
        deepspeed.__version__ = "0.20.0"
        import bmc_deepspeed
        print((deepspeed.InferenceEngine, deepspeed.DeepSpeedInferenceConfig) == stock)
        try:
            deepspeed.init_inference(None, kv_policy="bmc")
        except pydantic.ValidationError as error:
            print("Extra inputs are not permitted" in str(error))
        """
    )
    assert "bmc_deepspeed steps aside" in out
    assert "0.20.0 is outside the tested range" in out
    assert out.splitlines()[-2:] == ["True", "True"]


def test_hooks_the_installed_version_is_in_the_tested_range() -> None:
    """hooks.py: the tests of this checkout ran with what the range promises."""
    assert deepspeed.__version__.split("+")[0] == "0.19.8"
    assert deepspeed.InferenceEngine is not StockEngine
    assert bmc_deepspeed.BMCInjectionPolicy.config_class is BMCPolicyConfig


def test_inference_config_filter_of_auto() -> None:
    """inference_config.py: DeepSpeed drops every "auto" but one, and `strict` keeps them."""
    assert list(inspect.signature(DeepSpeedConfigModel.__init__).parameters) == [
        "self",
        "strict",
        "data",
    ]
    source = inspect.getsource(DeepSpeedConfigModel.__init__)
    assert 'v != "auto" or k == "replace_method"' in source
    assert "super().__init__(**data)" in source


def test_engine_injects_before_it_returns() -> None:
    """engine.py: when DeepSpeed's constructor ends, weights have their dtype, split and device."""
    source = inspect.getsource(StockEngine.__init__)
    steps = (
        "self._convert_to_dtype(config)",
        "self._apply_injection_policy(config, client_module)",
        "self.module.to(device)",
    )
    places = [source.rindex(step) for step in steps]
    assert places == sorted(places)
    assert list(inspect.signature(StockEngine.__init__).parameters) == ["self", "model", "config"]


def test_engine_generate_and_forward_call_the_module() -> None:
    """engine.py: generate is the module's, forward hands its arguments through."""
    assert "return self.module.generate(*inputs, **kwargs)" in inspect.getsource(
        StockEngine._generate
    )
    assert "outputs = self.module(*inputs, **kwargs)" in inspect.getsource(StockEngine.forward)


def test_policy_form() -> None:
    """policy.py: the abstract policy asks for `attention` alone; generic policies match a model."""
    assert DSPolicy.__abstractmethods__ == {"attention"}
    from deepspeed.module_inject.replace_policy import generic_policies

    for policy in generic_policies:
        assert {"match", "match_replaced", "apply", "attention"} <= set(dir(policy))


def test_policy_layers_of_autotp_are_no_linears() -> None:
    """policy.py: packing takes nn.Linear, so what DeepSpeed has split is left alone."""
    for layer in (module_inject.LinearLayer, module_inject.LinearAllreduce):
        assert issubclass(layer, torch.nn.Module)
        assert not issubclass(layer, torch.nn.Linear)
