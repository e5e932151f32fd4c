"""llama.cpp as a peer of the generate benchmark: llama-cpp-python in a child process.

Promises the same weights (a GGUF file written from the model's own tensors), the same threads, K
and V in the model's dtype and memory of its own for each sequence, with the settings that were
measured to be its fastest. Knows nothing of timing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Cache, LlamaForCausalLM

from benchmarks.engines.transformers import GenerateSystem
from benchmarks.lib.worker_client import WorkerProcess, worker_command

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
CALL_SECONDS = 600.0
"""For a request; the longest one runs a prompt of a few thousand rows through the model."""


class LlamaCpp(GenerateSystem):
    """llama.cpp over the model's weights.

    It has no reference but itself: its rows come from a prompt that it computes, not from the drawn
    K and V of the others. The greedy tokens of the small model are compared.

    Args:
        model: float32 or bfloat16, rotary positions not scaled.
        python: interpreter of an environment that has llama-cpp-python and gguf.
        threads: of llama.cpp.

    Raises:
        WorkerError: the interpreter or its packages do not do.
    """

    name, title, peer, reference = "llama_cpp", "llama.cpp", True, "llama_cpp"

    def __init__(self, model: LlamaForCausalLM, python: Path, threads: int) -> None:
        self.vocabulary = model.config.vocab_size
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        self.child = WorkerProcess(f"--llama-cpp-python {python}", worker_command(python, WORKER))
        try:
            tensors = _save(model, folder)
            self.child.ask(
                CALL_SECONDS,
                do="load",
                folder=str(folder),
                config=_config(model),
                tensors=tensors,
                threads=threads,
            )
        except BaseException:
            self.close()
            raise

    def new_cache(self, max_length: int) -> Cache:
        raise NotImplementedError("its cache lives in the child process")

    def fill(self, layer: int, key: torch.Tensor, value: torch.Tensor, steps: int) -> None:
        """As many rows per sequence as `key` has, of a prompt of its own."""
        if layer == 0:
            batch, _, rows, _ = key.shape
            self.child.ask(CALL_SECONDS, do="fill", batch=batch, rows=rows, steps=steps)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.child.ask(CALL_SECONDS, do="step", tokens=tokens[:, 0].tolist())
        path = Path(self.folder.name) / "logits.bin"
        logits = np.fromfile(path, np.float32).reshape(len(tokens), self.vocabulary)
        return torch.from_numpy(logits)

    def generate(self, prompts: torch.Tensor, new: int) -> torch.Tensor:
        answer = self.child.ask(CALL_SECONDS, do="generate", prompts=prompts.tolist(), new=new)
        return torch.tensor(answer["tokens"])

    def close(self) -> None:
        self.child.close()
        self.folder.cleanup()


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
