"""What each of two ranks runs: greedy tokens of split models with and without the KV policy.

Usage: tensor_parallel.py FOLDER MODEL...   Writes FOLDER/rank<N>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

import bmc_deepspeed  # noqa: F401  (makes DeepSpeed know kv_policy)
import bmc_transformers
from tests.support import tiny_decoders

NEW_TOKENS = 24


def requests() -> dict[str, dict[str, Any]]:
    return {
        "plain": {"input_ids": tiny_decoders.prompts(2, 20)},
        "left-padded": tiny_decoders.left_padded((20, 7, 13)),
        "prompt lookup": {
            "input_ids": tiny_decoders.prompts(1, 8).repeat(1, 3),
            "prompt_lookup_num_tokens": 3,
        },
    }


def split(name: str, seed: int = 0, **settings: Any) -> Any:
    return deepspeed.init_inference(
        tiny_decoders.make(name, seed),
        dtype=torch.float32,
        tensor_parallel={"tp_size": 2},
        **settings,
    )


def tokens(name: str, **settings: Any) -> dict[str, Any]:
    """Tokens of every request, and what shows which cache and layers made them."""
    engine = split(name, **settings)
    found: dict[str, Any] = {}
    for key, request in requests().items():
        out = engine.generate(**request, max_new_tokens=NEW_TOKENS, do_sample=False)
        found[key] = out.tolist()
    assistant = split(name, seed=1, **settings).module
    request = {"input_ids": tiny_decoders.prompts(1, 20), "assistant_model": assistant}
    out = engine.generate(**request, max_new_tokens=NEW_TOKENS, do_sample=False)
    found["assisted"] = out.tolist()
    with torch.no_grad():
        step = engine(tiny_decoders.prompts(2, 20), use_cache=True)
    found["forward"] = step.logits[:, -1].argmax(-1).tolist()
    found["cache"] = type(step.past_key_values).__name__
    found["store"] = type(getattr(step.past_key_values.layers[0], "store", None)).__name__
    found["kv heads"] = step.past_key_values.layers[0].keys.shape[1]
    found["layers"] = sorted({type(module).__name__ for module in engine.module.modules()})
    found["enabled"] = bmc_transformers.is_enabled(engine.module)
    return found


def main() -> None:
    folder, *names = sys.argv[1:]
    results = {
        name: {
            "stock": tokens(name),
            "bmc": tokens(name, kv_policy="bmc", kv_policy_config={"r": 16, "pack_linears": True}),
        }
        for name in names
    }
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
