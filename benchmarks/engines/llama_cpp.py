"""llama.cpp: llama-cpp-python in a process of its own, in the environment that has it.

Promises the same weights (a GGUF file written from the model's own tensors), the same threads, K
and V in the model's dtype and memory of its own for each sequence, with the settings that were
measured to be its fastest. Knows nothing of the engines beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.engines.base import Batch
from benchmarks.engines.worker_engine import WorkerEngine
from benchmarks.lib.llama import LlamaShape, RandomLlama, drawn_tokens
from benchmarks.lib.worker_client import WorkerProcess, worker_command

WORKER = Path(__file__).with_name("llama_cpp_worker.py")


class LlamaCpp(WorkerEngine):
    """llama.cpp over the model's weights: float32 or bfloat16, rotary positions not scaled.

    It has no reference but itself: its rows come from a prompt that it computes, not from the drawn
    K and V of the others. The greedy tokens of a small model can be compared.

    Args:
        python: interpreter of an environment that has llama-cpp-python and gguf.
        threads: of llama.cpp.
    """

    name, title, peer, reference = "llama_cpp", "llama.cpp", True, "llama_cpp"
    process = "llama.cpp"

    def __init__(self, python: Path, threads: int) -> None:
        self.python = python
        self.threads = threads

    def start(self, model: RandomLlama, largest: Batch) -> None:
        self.vocabulary = model.shape.vocabulary
        title = f"--llama-cpp-python {self.python}"
        self.worker = WorkerProcess(title, worker_command(self.python, WORKER))
        tensors = _save(model.module, self.folder)
        config = _config(model.module)
        self._ask(
            "load", folder=str(self.folder), config=config, tensors=tensors, threads=self.threads
        )

    def fill(self, batch: Batch) -> None:
        tokens = drawn_tokens(self.vocabulary, 1, batch.rows + 1)[0].tolist()
        self._ask("fill", prompt=tokens, batch=batch.sequences, new=batch.new_rows)

    def logits(self) -> torch.Tensor:
        self._ask("steps", count=1)
        rows = self._ask("logits")["rows"]
        logits = np.fromfile(self.folder / "logits.bin", np.float32)
        return torch.from_numpy(logits.reshape(rows, self.vocabulary))

    def start_bytes(self, shape: LlamaShape, largest: Batch) -> int:
        """Weights of its own: the GGUF file, mapped."""
        return shape.weight_bytes


def _config(model: LlamaForCausalLM) -> dict[str, Any]:
    config: Any = model.config
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r}: expected 'default' (llama.cpp's GGUF)")
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "head_size": config.head_dim,
        "rms_epsilon": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "vocabulary": config.vocab_size,
        "is_bfloat16": model.dtype == torch.bfloat16,
    }


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _save(model: LlamaForCausalLM, folder: Path) -> list[str]:
    """Each weight as a .npy file under its GGUF name: bfloat16 as uint16, norms as float32."""
    heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }
    names = []
    for full, tensor in model.state_dict().items():
        place = full.removesuffix(".weight")
        if place.startswith("model.layers."):
            layer, part = place.removeprefix("model.layers.").split(".", 1)
            kind, name = _NAMES[part], f"blk.{layer}.{_NAMES[part]}.weight"
        else:
            kind, name = _NAMES[place], f"{_NAMES[place]}.weight"
        if kind in heads:  # GGUF's llama rotates neighbors, transformers the two halves
            rows, columns = tensor.shape
            halves = tensor.view(heads[kind], 2, rows // heads[kind] // 2, columns)
            tensor = halves.transpose(1, 2).reshape(rows, columns)
        if tensor.dim() == 1:
            tensor = tensor.float()
        array = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        np.save(folder / f"{name}.npy", array.numpy())
        names.append(name)
    return names
