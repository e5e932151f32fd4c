"""What a model's KV cache is made of: layers, heads, head size, dtype.

Promises bytes per row, and that a Hugging Face style config is read under the names that model
families use. Knows no framework: a config is a mapping or an object with attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


@dataclass(frozen=True)
class Geometry:
    """Shape of a decoder's K and V.

    Args:
        num_layers: layers that keep K and V.
        num_query_heads: query heads; a multiple of ``num_kv_heads``.
        num_kv_heads: heads of K and of V.
        head_size: elements of one row of K in one head; V has as many.
        dtype: of K and V.
        hidden_size: width of the model; 0: query heads x head size.
        intermediate_size: width of the feed-forward layer; 0: four times the hidden size. The two
            widths matter to the cost of a step only, not to the cache.

    Raises:
        TypeError: a count is not an int, ``dtype`` not a torch.dtype.
        ValueError: a count is not positive, or the heads do not divide.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    hidden_size: int = 0
    intermediate_size: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_query_heads", "num_kv_heads", "head_size"):
            _check(name, getattr(self, name), least=1)
        for name in ("hidden_size", "intermediate_size"):
            _check(name, getattr(self, name), least=0)
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_query_heads={self.num_query_heads}: expected a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype={self.dtype!r}: expected a torch.dtype")
        if not self.hidden_size:
            object.__setattr__(self, "hidden_size", self.num_query_heads * self.head_size)
        if not self.intermediate_size:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)

    @property
    def layer_row_bytes(self) -> int:
        """Bytes of K and V of one row in one layer, one sequence."""
        return 2 * self.num_kv_heads * self.head_size * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one row over all layers, one sequence."""
        return self.num_layers * self.layer_row_bytes

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype | str | None = None) -> Geometry:
        """Reads a config as transformers writes it (`config.json`).

        Args:
            config: a mapping, or an object with the same names as attributes. Where it has a
                ``text_config`` and no layers of its own, that is read.
            dtype: instead of the config's; a config without one means float32, as in transformers.

        Raises:
            ValueError: a field is missing or has no allowed value; the message names it.
        """
        if _field(config, *_LAYERS) is None:
            text = _field(config, "text_config")
            config = config if text is None else text
        layers = _required(config, "the number of layers", *_LAYERS)
        heads = _required(config, "the number of attention heads", *_HEADS)
        head_size = _field(config, "head_dim")
        if head_size is None:
            hidden = _required(config, "the head size", *_HIDDEN, first="head_dim")
            if hidden % heads:
                raise ValueError(
                    f"config: hidden_size={hidden} is no multiple of {heads} attention heads; "
                    "head_dim is missing"
                )
            head_size = hidden // heads
        try:
            return cls(
                layers,
                heads,
                _kv_heads(config, heads),
                head_size,
                _dtype(dtype if dtype is not None else _field(config, "dtype", "torch_dtype")),
                _field(config, *_HIDDEN) or 0,
                _field(config, *_INNER) or 0,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"config: {error}") from None


def _check(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an int >= {least}")
    if value < least:
        raise ValueError(f"{name}={value}: expected an int >= {least}")


def _field(config: Any, *names: str) -> Any:
    """The first field that is there and not None."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return None


def _required(config: Any, what: str, *names: str, first: str = "") -> int:
    value = _field(config, *names)
    if value is None:
        missing = " or ".join((first, *names) if first else names)
        raise ValueError(f"config: {what} is missing; expected the field {missing}")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"config: {what} is {value!r} ({' or '.join(names)}); expected an int > 0")
    return value


def _kv_heads(config: Any, heads: int) -> int:
    given = _field(config, "num_key_value_heads")
    if given is not None:
        return given
    # Falcon and GPT-BigCode: one head of K and V, or num_kv_heads with Falcon's newer layers.
    if _field(config, "multi_query") and not _field(config, "new_decoder_architecture"):
        return 1
    return _field(config, "num_kv_heads") or heads


def _dtype(value: object) -> torch.dtype:
    if value is None or value == "auto":
        return torch.float32
    if isinstance(value, torch.dtype):
        return value
    found = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={value!r}: expected the name of a torch dtype, as bfloat16")
    return found
