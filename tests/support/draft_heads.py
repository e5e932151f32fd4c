"""Tiny random heads that draft for `models`' targets, under the names of their checkpoints."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

STD = 0.15


class Eagle(nn.Module):
    """One layer behind a projection of (embedding, hidden state), with EAGLE's names.

    Args:
        llama: of one layer, which becomes the head's.
    """

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.config = llama.config
        self.config.architectures = ["LlamaForCausalLM"]
        self.layers = llama.model.layers
        del self.layers[0].input_layernorm  # EAGLE's first layer has none
        size = self.config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=False)

    def save_pretrained(self, path: Path) -> None:
        self.config.save_pretrained(path)
        save_file(self.state_dict(), path / "model.safetensors", {"format": "pt"})


class Eagle3(Eagle):
    """One layer over embedding and hidden state side by side; reads two layers of the target."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__(llama)
        size, layer = self.config.hidden_size, self.layers[0]
        self.config.eagle_aux_hidden_state_layer_ids = [0, 1]
        self.config.num_aux_hidden_states = 2
        self.midlayer = layer
        del self.layers
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(attention, name).out_features
            setattr(attention, name, linear(2 * size, rows))
        self.fc = linear(2 * size, size)
        norm = type(layer.post_attention_layernorm)
        layer.input_layernorm = norm(size)
        layer.hidden_norm = norm(size)
        self.norm = norm(size)
        self.lm_head = linear(size, self.config.vocab_size)


class Medusa(nn.Module):
    """Three heads, each for one position, over the target's last hidden state."""

    HEADS = 3

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": hidden_size,
            "vocab_size": vocab_size,
            "num_heads": self.HEADS,
            "num_hidden_layers": 1,
        }
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"layers": nn.ModuleList([linear(hidden_size, hidden_size)])})
            for _ in range(self.HEADS)
        )
        self.lm_heads = nn.ModuleList(linear(hidden_size, vocab_size) for _ in range(self.HEADS))

    def save_pretrained(self, path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.config))
        save_file(self.state_dict(), path / "model.safetensors", {"format": "pt"})


class WithMTPLayer(nn.Module):
    """A Qwen2 under MiMo's name, with the one layer that predicts a token further on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = model.config
        self.config.architectures = ["MiMoForCausalLM"]
        self.config.num_nextn_predict_layers = 1
        self.model, self.lm_head = model.model, model.lm_head
        decoder = type(model)(model.config).model.layers[0]
        size, norm = self.config.hidden_size, type(decoder.input_layernorm)
        decoder.token_layernorm, decoder.hidden_layernorm = norm(size), norm(size)
        decoder.final_layernorm = norm(size)
        decoder.input_proj = linear(2 * size, size)
        self.model.mtp_layers = nn.ModuleList([decoder])

    def save_pretrained(self, path: Path) -> None:
        self.config.save_pretrained(path)
        save_file(self.state_dict(), path / "model.safetensors", {"format": "pt"})


def linear(columns: int, rows: int) -> nn.Linear:
    made = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(made.weight, std=STD)
    return made
