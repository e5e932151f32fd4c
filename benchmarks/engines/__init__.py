"""Whole frameworks behind one contract, `base.Engine`, each with BMC and without it.

A command names the engines that it compares and knows nothing else of them. An engine's framework
is imported when it is made; one that must be apart (another environment, an engine that takes the
whole process) is a client, and its worker's file lies beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from benchmarks.engines.base import Engine

HUGGING_FACE = (
    "dynamic", "static", "deepspeed", "bmc", "bmc_views", "bmc_packed", "bmc_deepspeed",
)  # fmt: skip
"""Those whose caches can be filled in this process, over the weights of one module."""
VLLM = ("bmc_vllm", "cpu_attn")
NAMES = (*HUGGING_FACE, "llama_cpp", *VLLM)


class Settings(NamedTuple):
    """What engines are made with; each takes what concerns it.

    Attributes:
        threads: of llama.cpp. Those in this process use torch's.
        r: rows per growth, of BMC's Hugging Face caches.
        llama_cpp_python: interpreter of an environment with llama-cpp-python and gguf.
        bind: value of VLLM_CPU_OMP_THREADS_BIND; "": vLLM's own default.
        compile: vLLM with torch.compile.
        drawn: vLLM's cache is filled with drawn rows; otherwise prompts run through the model.
    """

    threads: int = 1
    r: int = 128
    llama_cpp_python: Path | None = None
    bind: str = ""
    compile: bool = False
    drawn: bool = True


def make(name: str, settings: Settings) -> Engine:
    """The engine of that name, not started.

    Raises:
        ImportError: it needs a package that is not installed.
        ValueError: there is none of that name, or a setting that it needs is missing.
    """
    if name in VLLM:
        from benchmarks.engines import vllm

        return vllm.VLLM(name, settings.bind, compile=settings.compile, drawn=settings.drawn)
    if name == "llama_cpp":
        from benchmarks.engines.llama_cpp import LlamaCpp

        if settings.llama_cpp_python is None:
            raise ValueError("llama_cpp needs llama_cpp_python; allowed: path of an interpreter")
        return LlamaCpp(settings.llama_cpp_python, settings.threads)
    if name in ("deepspeed", "bmc_deepspeed"):
        from benchmarks.engines import deepspeed

        return deepspeed.make(name, settings.r)
    if name in HUGGING_FACE:
        from benchmarks.engines import transformers

        return transformers.make(name, settings.r)
    raise ValueError(f"engine {name!r}; allowed: {', '.join(NAMES)}")
