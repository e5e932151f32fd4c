"""Tensors that are computed only if somebody looks: packed K and V rows, and attention masks.

transformers hands K, V and mask from the cache and the mask function, through the model's own code,
to the attention function. Ours needs none of them as plain tensors. What travels is a
`torch.Tensor` of the right shape and dtype that knows where it came from. Any torch operation on it
works on the plain tensor, which is made then: a model that does something else with K, V or the
mask is right, only slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from bmc_core.kv_store import PackedStore
from bmc_transformers.gradients import refuse


class LazyTensor(torch.Tensor):
    """Base: a tensor without memory of its own, made plain by `_make` when it is used.

    Attributes:
        is_modified: somebody has written into the plain tensor, or has a view to do it with; from
            then on it counts more than what it was made from.
    """

    is_modified: bool
    _plain: torch.Tensor | None

    # Shape and dtype are answered without Python; every operation arrives at the dispatcher.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = any(argument.alias_info is not None for argument in func._schema.arguments)

        def plain(lazy: LazyTensor) -> torch.Tensor:
            lazy.is_modified |= aliases
            return lazy.plain()

        args, kwargs = tree_map_only(LazyTensor, plain, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _make(self) -> torch.Tensor:
        raise NotImplementedError

    def plain(self) -> torch.Tensor:
        """The tensor itself; made once."""
        if self._plain is None:
            # Not an inference tensor: it may be written outside inference mode.
            with torch.inference_mode(False), torch.no_grad():
                self._plain = self._make()
        return self._plain


class PackedRows(LazyTensor):
    """K (part 0) or V (part 1) of a packed layer: the newest `rows` rows of its store.

    `[batch, heads, rows, head size]`. Good until rows of the store are moved or forgotten.
    """

    store: PackedStore
    part: int
    length: int
    epoch: int

    @staticmethod
    def of(store: PackedStore, part: int, rows: int, *, requires_grad: bool = False) -> PackedRows:
        kv = store.tensor()
        lazy = torch.Tensor._make_wrapper_subclass(
            PackedRows,
            (kv.shape[0], kv.shape[1], rows, kv.shape[3] // 2),
            dtype=kv.dtype,
            requires_grad=requires_grad,
        )
        lazy.store = store
        lazy.part = part
        lazy.length = store.length
        lazy.epoch = store.epoch
        lazy._plain = None
        lazy.is_modified = False
        if requires_grad:
            lazy.register_hook(refuse)
        return lazy

    @property
    def is_current(self) -> bool:
        """Whether these are still the newest rows of the store."""
        return self.epoch == self.store.epoch and self.length == self.store.length

    def _make(self) -> torch.Tensor:
        if not self.is_current:
            raise RuntimeError(
                "K and V of an earlier step were used after the cache had changed; "
                "clone them while the step lasts"
            )
        rows = self.shape[2]
        return self.store.newest_values(rows) if self.part else self.store.newest_keys(rows)


class CausalMask(LazyTensor):
    """A causal mask `[batch, 1, queries, rows]` (True: attend), aligned to the end, that is known
    by its pattern: an optional window, and how many of the rows each sequence hides at their
    beginning (`first_rows`, int32 `[batch]`; None: none).
    """

    first_rows: torch.Tensor | None
    window: int | None
    _maker: Callable[[], torch.Tensor | None]

    @staticmethod
    def of(
        shape: tuple[int, int, int, int],
        *,
        first_rows: torch.Tensor | None,
        window: int | None,
        maker: Callable[[], torch.Tensor | None],
    ) -> CausalMask:
        lazy = torch.Tensor._make_wrapper_subclass(CausalMask, shape, dtype=torch.bool)
        lazy.first_rows = first_rows
        lazy.window = window
        lazy._maker = maker
        lazy._plain = None
        lazy.is_modified = False
        return lazy

    def _make(self) -> torch.Tensor:
        mask = self._maker()
        assert mask is not None  # it is told not to skip
        return mask
