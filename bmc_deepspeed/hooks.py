"""How DeepSpeed learns of ``kv_policy="bmc"``.

DeepSpeed 0.19 has no plug-in point, but ``init_inference`` looks up its config class and its engine
class in its module when it is called: both names are bound to our subclasses. A DeepSpeed with a
registry of KV policies (``patches/``) is told there instead, and nothing is bound.

Promises: done once however often it is called; outside the tested versions nothing is changed and
one log line says so, and ``kv_policy`` is then refused by DeepSpeed as an unknown field.
"""

from __future__ import annotations

import importlib.util

import deepspeed
from deepspeed.utils import logger
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from bmc_core.log import log_once

TESTED_DEEPSPEED = ">=0.19.8,<0.20"
"""DeepSpeed versions that the tests ran with."""

REGISTRY = "deepspeed.inference.kv_policy"


def install() -> None:
    """Makes DeepSpeed know the KV policy "bmc"."""
    reason = why_aside()
    if reason is not None:
        log_once(logger, f"bmc_deepspeed steps aside, kv_policy is not available: {reason}")
    elif _has_registry():
        _register()
    else:
        _rebind()


def why_aside() -> str | None:
    """Why this DeepSpeed is left as it is; None: it takes ``kv_policy``."""
    tested = SpecifierSet(TESTED_DEEPSPEED).contains(Version(deepspeed.__version__).base_version)
    if tested or _has_registry():
        return None
    return f"DeepSpeed {deepspeed.__version__} is outside the tested range {TESTED_DEEPSPEED}"


def _has_registry() -> bool:
    return importlib.util.find_spec(REGISTRY) is not None


def _register() -> None:
    from bmc_deepspeed.injection_policy import BMCInjectionPolicy

    registry = importlib.import_module(REGISTRY)
    registry.register_kv_policy("bmc", BMCInjectionPolicy)


def _rebind() -> None:
    from bmc_deepspeed.engine import InferenceEngine
    from bmc_deepspeed.inference_config import DeepSpeedInferenceConfig

    deepspeed.DeepSpeedInferenceConfig = DeepSpeedInferenceConfig
    deepspeed.InferenceEngine = InferenceEngine
