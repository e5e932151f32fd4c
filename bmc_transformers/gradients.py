"""No silent gradients: what the cache keeps has no history, so going back through it is an error.

A forward pass outside `torch.no_grad` is fine. A backward pass would miss everything that went
through the cache's memory, the kernel or packed weights, and must not look as if it had not.
"""

from __future__ import annotations

from typing import NoReturn

import torch


def refuse(gradient: torch.Tensor) -> NoReturn:
    """A backward hook that raises RuntimeError."""
    raise RuntimeError(
        "BMC keeps no gradients: its cache, its kernel and packed linears are for inference. "
        "Train with bmc_transformers.disable(model), or with use_cache=False and stock attention."
    )


def wants_gradients(tensor: torch.Tensor) -> bool:
    """Whether autograd would follow an operation on this tensor."""
    return tensor.requires_grad and torch.is_grad_enabled()


def refuse_gradients(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with a history that ends in an error."""
    tensor = tensor.detach().requires_grad_()
    tensor.register_hook(refuse)
    return tensor
