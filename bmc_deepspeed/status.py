"""What `python -m bmc_core info` says of DeepSpeed."""

from __future__ import annotations

from bmc_core.environment import Framework, version
from bmc_deepspeed.hooks import TESTED_DEEPSPEED, why_aside


def status() -> Framework:
    """The installed DeepSpeed, and whether it takes ``kv_policy``."""
    return Framework(version("deepspeed"), TESTED_DEEPSPEED, why_aside())
