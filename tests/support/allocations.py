"""Allocations that fail, one after the other, while a real operation runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FailingAllocation(TorchDispatchMode):
    """The torch operation number `fatal` (from 0) that takes memory raises as the allocator does.

    An operation takes memory if a tensor that it returns is none of its arguments and no view.
    """

    def __init__(self, fatal: int) -> None:
        super().__init__()
        self.fatal = fatal
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(
            isinstance(result.type, torch.TensorType) and result.alias_info is None
            for result in func._schema.returns
        ):
            self.count += 1
            if self.count > self.fatal:
                raise RuntimeError(f"can't allocate memory for {func}")
        return func(*args, **(kwargs or {}))


def fail_each_allocation(operation: Callable[[], object], check: Callable[[], None]) -> int:
    """Runs `operation` with its first allocation failing, then its second, ... until it succeeds.

    `check` is called after each failure. Returns how many there were.
    """
    fatal = 0
    while True:
        try:
            with FailingAllocation(fatal):
                operation()
            return fatal
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            check()
        fatal += 1
