"""Run with a patched or a plain vLLM: our platform without its choice of the backend.

Usage: patched_vllm.py FOLDER   Makes a tiny model in FOLDER and prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import torch
import vllm
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from bmc_vllm.platform import BMCPlatform
from tests.support.engines import engine, generate, prompts_of, worker
from tests.support.models import ModelStore


def choice(backend: str | None, head_size: int) -> str:
    layer = AttentionSelectorConfig(head_size, torch.float32, "auto", None)
    member = None if backend is None else AttentionBackendEnum[backend]
    return current_platform.get_attn_backend_cls(member, layer).rsplit(".", 1)[-1]


def main() -> None:
    # The hook that the patch makes superfluous; the rest of the platform stays.
    del BMCPlatform.get_attn_backend_cls
    model = ModelStore(Path(sys.argv[1]))("llama-gqa")
    with engine(model, "BMC") as llm:
        tokens = generate(llm, prompts_of([5, 40]))
        layers = worker(llm).model_runner.model.modules()
        backends = {
            layer.attn_backend.__name__ for layer in layers if hasattr(layer, "attn_backend")
        }
    result = {
        "package": str(Path(vllm.__file__).parent),
        "hook": "get_attn_backend_cls" in vars(BMCPlatform),
        "backends": sorted(backends),
        "tokens": tokens,
        "head size 40": choice("BMC", 40),
        "not chosen": choice(None, 64),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
