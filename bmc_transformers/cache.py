"""BMCCache: a transformers cache whose layers grow by chunks of rows.

Promises what `DynamicCache` gives, token for token, for models whose layers keep K and V (all rows
or a window). With the "bmc" attention on a CPU its rows are packed for the native kernel; otherwise
it hands out views of the valid rows, on any device. A call that raises leaves all layers with the
same rows. Knows nothing of `generate`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from bmc_core.kv_store import (
    KVCounters,
    KVStore,
    PackedStore,
    RowsStore,
    StepTables,
    reorder_stores,
    uninterrupted,
    why_not_packed,
)
from bmc_core.log import log_once
from bmc_core.policy import BMCPolicy, GrowthPolicy
from bmc_transformers import attention
from bmc_transformers.layers import BMCLayer, BMCSlidingLayer, length_after_crop, repeated
from bmc_transformers.stats import CacheStats, cache_stats

logger = logging.getLogger("bmc_transformers")

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")

PolicyLike = GrowthPolicy | int | str


def unsupported_layer_types(config: PreTrainedConfig) -> list[str]:
    """The layer types of a model that BMCCache cannot hold (recurrent states and the like)."""
    layer_types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return sorted(set(layer_types) - set(LAYER_TYPES))


class _Stores:
    """Makes the stores of one cache: same policy, counters and index tensors for all layers."""

    def __init__(self, config: PreTrainedConfig, policy: GrowthPolicy, limit: int | None) -> None:
        self.config = config
        self.policy = policy
        self.limit = limit
        self.counters = KVCounters()
        self.tables = StepTables()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stores:
        # The config stays the model's: it says which attention the model has now.
        twin = _Stores(self.config, self.policy, self.limit)
        memo[id(self)] = twin
        twin.counters = copy.deepcopy(self.counters, memo)
        twin.tables = copy.deepcopy(self.tables, memo)
        return twin

    def layout(self, key: torch.Tensor, value: torch.Tensor) -> str:
        if self.config._attn_implementation != attention.NAME:
            return "rows"
        reason = why_not_packed(key, value)
        if reason is None:
            return "packed"
        log_once(logger, f"BMCCache: plain rows and torch attention, because {reason}")
        return "rows"

    def make(self, key: torch.Tensor, value: torch.Tensor) -> KVStore:
        if self.layout(key, value) == "rows":
            return RowsStore(self.policy, limit=self.limit, counters=self.counters)
        return PackedStore(
            self.policy, limit=self.limit, counters=self.counters, tables=self.tables
        )


class BMCCache(Cache):
    """A cache for `model.generate(..., past_key_values=cache)` or a model's forward.

    Args:
        config: the model's config; it says which layers keep a window.
        policy: a `BMCPolicy`, an int r, or "auto".
        max_length: tokens that a sequence is expected to reach at most, so that no more is
            allocated; outgrowing it is allowed. None: not known (a policy that needs a limit takes
            the model's `max_position_embeddings`).

    Raises:
        ValueError: a layer type that it cannot hold, an encoder-decoder config, a bad setting.
        TypeError: a setting of the wrong type.
    """

    layers: list[BMCLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: PolicyLike = "auto",
        *,
        max_length: int | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"config is a {type(config).__name__}; allowed: a model's configuration "
                "(model.config)"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"config {type(config).__name__}: encoder-decoder models are not supported; "
                "allowed: decoder-only models"
            )
        if max_length is not None and (isinstance(max_length, bool) or max_length <= 0):
            raise ValueError(f"max_length={max_length}: allowed is a positive int, or None")
        unsupported = unsupported_layer_types(config)
        if unsupported:
            raise ValueError(
                f"config {type(config).__name__} has layers of type {', '.join(unsupported)}; "
                f"allowed: {', '.join(LAYER_TYPES)}"
            )
        text_config = config.get_text_config(decoder=True)
        chosen = BMCPolicy.parse(policy)
        if max_length is None and getattr(chosen, "needs_limit", False):
            max_length = getattr(text_config, "max_position_embeddings", None)
            if max_length is None:
                raise ValueError(f"max_length=None: policy {chosen} needs a positive int")
        self._stores = _Stores(text_config, chosen, max_length)
        super().__init__(layers=_layers(text_config, self._stores))  # type: ignore[arg-type]

    @property
    def policy(self) -> GrowthPolicy:
        """What decides how many rows a growth adds."""
        return self._stores.policy

    # torch.compile breaks its graph here: it cannot follow a tensor that grows.
    @torch.compiler.disable
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends one step's rows of one layer; see `BMCLayer.update`.

        If it raises, what earlier layers took in this step is undone, so that the cache goes on
        from the tokens before the step.
        """
        layer = self.layers[layer_idx]
        try:
            return layer.update(key_states, value_states, *args, **kwargs)
        except BaseException:
            self._truncate(layer.get_seq_length())
            raise

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, ...]]:
        """K, V and window of each layer, as `DynamicCache` gives them: the valid rows
        `[batch, heads, rows, size]` (None where nothing came yet) and an int64 tensor of the
        window's rows, None for a layer without. A sliding layer may show more rows than its window.
        """
        for layer in self.layers:
            keys, window = layer.keys, None
            if isinstance(layer, BMCSlidingLayer):
                device = None if keys is None else keys.device
                window = torch.tensor(layer.sliding_window, device=device)
            yield keys, layer.values, window

    def stats(self) -> CacheStats:
        """Growths, copies, bytes and rows so far; `print` shows them as a table."""
        return cache_stats(self.layers, self._stores.counters)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest tokens: `-n` forgets n; a positive number is the tokens to keep.

        No copy, no allocation. Raises RuntimeError before any change where a window's rows that the
        next step would see were dropped already.
        """
        self._truncate(length_after_crop(self.get_seq_length(), tokens_to_remove))

    def _truncate(self, length: int) -> None:
        layers = [layer for layer in self.layers if layer.get_seq_length() >= length]
        for layer in layers:
            layer.check_truncate(length)
        for layer in layers:
            layer.truncate(length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i of every layer becomes what `beam_idx[i]` was, in place."""
        reorder_stores(self._filled(), beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times."""
        stores = self._filled()
        if stores:
            self._select(stores, repeated(stores[0].batch_size, repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences `indices`, in that order."""
        self._select(self._filled(), torch.as_tensor(indices))

    def _select(self, stores: list[KVStore], indices: torch.Tensor) -> None:
        # All new tensors exist before the first layer changes: a failure changes none.
        selected = [store.gathered(indices) for store in stores]
        with uninterrupted():
            for store, tensors in zip(stores, selected, strict=True):
                store.adopt(tensors)

    def _filled(self) -> list[KVStore]:
        return [
            layer.store for layer in self.layers if layer.store is not None and layer.store.length
        ]


def _layers(config: PreTrainedConfig, stores: _Stores) -> list[BMCLayer]:
    layer_types, settings = get_layer_types_and_kwargs(config)
    return [
        BMCLayer(stores) if layer_type == "full_attention" else BMCSlidingLayer(stores, **setting)
        for layer_type, setting in zip(layer_types, settings, strict=False)
    ]
