"""Run with a patched DeepSpeed: `bmc_deepspeed` registers its policy and rebinds nothing.

Prints one line of JSON.
"""

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from pydantic import ValidationError

from tests.support import tiny_decoders

stock = {name: getattr(deepspeed, name) for name in ("InferenceEngine", "DeepSpeedInferenceConfig")}
import bmc_deepspeed  # noqa: E402, F401  (registers the policy)

BMC: dict[str, Any] = {"kv_policy": "bmc", "kv_policy_config": {"r": 16}}


def refusal(**settings: Any) -> str:
    try:
        deepspeed.init_inference(torch.nn.Linear(2, 2), dtype=torch.float32, **settings)
    except ValidationError as error:
        return str(error)
    return ""


def main() -> None:
    tokens, caches = [], {}
    for name, settings in {"stock": {}, "bmc": BMC}.items():
        engine = deepspeed.init_inference(
            tiny_decoders.make("llama-gqa"), dtype=torch.float32, **settings
        )
        ids = tiny_decoders.prompts(2, 20)
        tokens.append(engine.generate(ids, max_new_tokens=24, do_sample=False))
        with torch.no_grad():
            caches[name] = type(engine(ids, use_cache=True).past_key_values).__name__
    result = {
        "package": str(Path(deepspeed.__file__).parent),
        "rebound": [name for name, value in stock.items() if getattr(deepspeed, name) != value],
        "same tokens": torch.equal(*tokens),
        "caches": caches,
        "refused": {
            "policy": refusal(kv_policy="bcm"),
            "setting": refusal(kv_policy="bmc", kv_policy_config={"rows": 4}),
            "alone": refusal(kv_policy_config={"r": 4}),
            "kernels": refusal(kv_policy="bmc", replace_with_kernel_inject=True),
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
