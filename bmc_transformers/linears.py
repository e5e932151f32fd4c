"""Linear layers whose weight is packed once for oneDNN, instead of at every call.

Decoding reads every weight once per step. torch's own bfloat16 product re-arranges the weight each
time and reaches a part of the memory's bandwidth; a packed weight is read as it lies
(docs/transformers.md has figures). The weight is held once: packed while packed, plain after
`unpack_linears`, which brings the very same `Parameter` objects back.

Packed are modules that are exactly `torch.nn.Linear`, on the CPU, in bfloat16 or float32. Left
alone are subclasses (AutoTP's layers, quantized layers), weights that another module shares (tied
embeddings) and modules whose `forward` somebody has replaced. State dicts have the plain weight.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from bmc_core.log import log_once
from bmc_transformers.gradients import refuse_gradients, wants_gradients

logger = logging.getLogger("bmc_transformers")

DTYPES = (torch.bfloat16, torch.float32)
"""Where packing was measured to help; float16 was not faster."""


class PackedLinear(torch.nn.Linear):
    """A `Linear` whose `weight` parameter is an opaque oneDNN tensor of the same shape.

    Made from a `Linear` in place by `pack_linears`, so that hooks, names and references stay.
    """

    plain_weight: torch.nn.Parameter
    """The parameter that was there before, emptied; `unpack` fills it again."""

    # torch.compile cannot trace an operator over oneDNN tensors.
    @torch.compiler.disable
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.weight.is_mkldnn:
            return torch.nn.functional.linear(input, self.weight, self.bias)
        tracked = wants_gradients(input) or wants_gradients(self.plain_weight)
        bias = None if self.bias is None else self.bias.detach()
        out = torch.ops.mkldnn._linear_pointwise(
            input.detach() if tracked else input, self.weight.detach(), bias, "none", [], ""
        )
        return refuse_gradients(out) if tracked else out

    def pack(self) -> None:
        """The plain weight becomes a packed one."""
        plain = self._parameters["weight"]
        assert plain is not None
        with torch.inference_mode(False), torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(plain.detach())
            self._parameters["weight"] = torch.nn.Parameter(packed, requires_grad=False)
            plain.data = torch.empty(0, dtype=plain.dtype)
        # Not a registered parameter: it is nobody's weight for now.
        vars(self)["plain_weight"] = plain

    def unpack(self) -> None:
        """The packed weight becomes the plain one of before."""
        packed = self._parameters["weight"]
        plain = vars(self).pop("plain_weight", None)
        if packed is None or plain is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            plain.data = packed.detach().to_dense()
        self._parameters["weight"] = plain

    def _packed_again(self, change: Callable[[], Any]) -> Any:
        """Runs something on the plain weight, and packs the result where that is possible."""
        self.unpack()
        try:
            return change()
        finally:
            reason = why_not_packed(self)
            if reason is None:
                self.pack()
            else:
                log_once(logger, f"pack_linears: a layer is no longer packed, because {reason}")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return self._packed_again(lambda: super(PackedLinear, self)._apply(fn, recurse))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[f"{prefix}weight"] = self.weight.detach().to_dense()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed_again(lambda: super(PackedLinear, self)._load_from_state_dict(*args, **kwargs))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the plain weight, packed again when it arrives."""
        state = dict(vars(self))
        plain = state.pop("plain_weight", None)
        if plain is not None:
            weight = torch.nn.Parameter(self.weight.detach().to_dense(), plain.requires_grad)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if why_not_packed(self) is None:
            self.pack()


def why_not_packed(module: torch.nn.Linear) -> str | None:
    """Why this layer's weight cannot be packed; None: it can."""
    weight = module.weight
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}, not on the CPU"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}; allowed: {DTYPES}"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 support in oneDNN"
    if weight.layout != torch.strided or weight.numel() == 0:
        return f"its weight has layout {weight.layout} and {weight.numel()} elements"
    return None


def pack_linears(model: torch.nn.Module) -> int:
    """Packs every linear layer that can be packed; those that are packed stay.

    Returns:
        How many are packed now.
    """
    uses = Counter(
        tensor.untyped_storage().data_ptr()
        for module in model.modules()
        for tensor in module._parameters.values()
        if tensor is not None and tensor.layout == torch.strided and tensor.numel()
    )
    count = 0
    for module in model.modules():
        if type(module) is PackedLinear:
            count += 1
        elif type(module) is torch.nn.Linear and _is_plain(module, uses):
            module.__class__ = PackedLinear
            module.pack()  # type: ignore[operator]
            count += 1
    if count == 0:
        log_once(logger, f"pack_linears: nothing to pack in {type(model).__name__}")
    return count


def _is_plain(module: torch.nn.Linear, uses: Counter[int]) -> bool:
    return (
        type(module.weight) is torch.nn.Parameter
        and "forward" not in vars(module)
        and why_not_packed(module) is None
        and uses[module.weight.untyped_storage().data_ptr()] == 1
    )


def unpack_linears(model: torch.nn.Module) -> int:
    """Makes every packed layer what it was before.

    Returns:
        How many there were.
    """
    count = 0
    for module in model.modules():
        if type(module) is PackedLinear:
            module.unpack()
            module.__class__ = torch.nn.Linear  # type: ignore[assignment]
            count += 1
    return count
