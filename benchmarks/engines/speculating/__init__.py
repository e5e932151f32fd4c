"""Frameworks that generate with draft tokens behind one contract, `base.Speculator`.

A speculator is a framework with or without BMC in one mode: no draft tokens, a fixed number of them
each step, its own way of choosing, or BMC's controller. Importing this imports no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.engines.speculating.base import Speculator

VLLM = ("bmc_vllm", "cpu_attn")
HUGGING_FACE = ("dynamic", "bmc", "deepspeed", "bmc_deepspeed")
OPENMP = ("libgomp", "libiomp5")
"""Runtimes that vLLM's processes can preload."""


def make(name: str, mode: str, *, bind: str = "", openmp: str = "libgomp") -> Speculator:
    """The speculator of that name in that mode, not started.

    Raises:
        ImportError: it needs a package that is not installed.
        ValueError: there is none of that name or with that mode.
    """
    if name in VLLM:
        from benchmarks.engines.speculating import vllm

        return vllm.VLLM(name, mode, bind, openmp)
    if name in HUGGING_FACE:
        from benchmarks.engines.speculating import transformers

        if "deepspeed" in name:
            import deepspeed  # noqa: F401 - said now, not after the model is made

        return transformers.HuggingFace(name, mode)
    raise ValueError(f"system {name!r}; allowed: {', '.join((*VLLM, *HUGGING_FACE))}")
