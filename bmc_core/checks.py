"""Checks of the tensors and numbers that go to native code, by name and before anything changes.

Promises that a tensor which passes has the values that its memory holds, that every byte which its
shape and strides reach is there, and that no gradient is lost in silence. Knows nothing of
attention or of caches: what shapes mean, and which go together, is the caller's
(`bmc_core.attention`).

Called for every layer of every step: what is allowed is put into words only where it is not met.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch.autograd import forward_ad

FLOAT32 = torch.finfo(torch.float32)

Span = tuple[int, int]
"""Addresses `[begin, end)` of a tensor's bytes, gaps between its rows included."""


def refusal(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name} is {value}; allowed: {allowed}")


def check_number(name: str, value: float, allowed: str = "a finite float32") -> None:
    try:
        finite = math.fabs(value) <= FLOAT32.max
    except OverflowError:  # an integer beyond any float
        finite = False
    except TypeError:
        raise TypeError(f"{name} is {value!r}; allowed: {allowed}") from None
    if not finite:
        raise refusal(name, value, allowed)


def whole_number(name: str, value: int, allowed: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; allowed: {allowed}") from None


def check_cpu_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, dim: int) -> Span:
    """A CPU tensor of that dtype and number of dimensions, any strides.

    Returns:
        Where its bytes are; an empty span for a tensor without elements.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: on another device, of other dimensions, with gradients, or its memory does not
            hold its values or is not all there.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; allowed: a torch.Tensor")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on device {tensor.device}; allowed: cpu")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: {dtype}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {dim} dimensions")
    if tensor.requires_grad or forward_ad._current_level >= 0:
        _check_no_gradients(name, tensor)
    # A CPU tensor's memory may still hold other values than the tensor, or not exist.
    if tensor.is_neg():
        raise ValueError(
            f"{name} has its negative bit set (a view such as x.conj().imag); "
            "allowed: a tensor whose memory holds its values, as resolve_neg() gives"
        )
    return _checked_span(name, tensor)


def check_rows(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[Span, tuple[int, ...]]:
    """`[tokens, heads, head size]`, any strides but the last, which must be 1.

    Returns:
        Where its bytes are, and its strides: asked one by one they cost as much as the checks.
    """
    span = check_cpu_tensor(name, tensor, dtype, 3)
    strides = tensor.stride()
    if strides[2] != 1:
        raise ValueError(f"{name} has strides {strides}; allowed: a contiguous last dimension")
    return span, strides


def _check_no_gradients(name: str, tensor: torch.Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires gradients, which native code does not give; allowed: a call within "
            "torch.no_grad() or torch.inference_mode(), or a detached tensor"
        )
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name} carries a forward-mode tangent, which native code does not give; allowed: a "
            "call within torch.inference_mode(), or a detached tensor"
        )


def _checked_span(name: str, tensor: torch.Tensor) -> Span:
    try:
        begin = tensor.data_ptr()  # first: a copy-on-write tensor gets memory of its own by it
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
    except RuntimeError:  # sparse, or a wrapper of transforms: "does not have storage"
        raise _without_memory(name, tensor) from None
    if base == 0:  # a freed tensor's own address is its offset
        if tensor.numel() == 0:
            return 0, 0
        raise _without_memory(name, tensor)
    if tensor.is_contiguous():
        end = begin + tensor.nbytes
    else:
        end = begin + _extent(tensor.shape, tensor.stride()) * tensor.itemsize
    size = storage.nbytes()
    if end - base > size:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()} and storage offset "
            f"{tensor.storage_offset()}, which end at byte {end - base} of a storage of {size}; "
            "allowed: a tensor within its storage (was the storage resized?)"
        )
    return begin, end


def _without_memory(name: str, tensor: torch.Tensor) -> ValueError:
    return ValueError(
        f"{name} is a {type(tensor).__name__} without memory of its own; "
        "allowed: a strided tensor with storage (no fake, sparse or freed one)"
    )


@functools.lru_cache(maxsize=256)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two elements might lie at one address (never False where two do)."""
    reach = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def check_apart(name: str, span: Span, other_name: str, other: Span) -> None:
    """That two tensors share no memory, gaps between their rows included."""
    if spans_meet(span, other):
        raise overlap(name, other_name)


def spans_meet(span: Span, other: Span) -> bool:
    return span[0] < other[1] and other[0] < span[1]


def overlap(name: str, other_name: str) -> ValueError:
    return ValueError(f"{name} shares memory with {other_name}; allowed: memory of its own")


def same_or_apart(rows: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of rows, of one shape and dtype, are the same or share no element."""
    same = rows.data_ptr() == other.data_ptr() and _same_strides(rows, other)
    return same or _take_turns(rows, other)


def _same_strides(rows: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether equal indices are equally far from the beginning, for tensors of one shape."""
    steps = zip(rows.shape, rows.stride(), other.stride(), strict=True)
    return all(size == 1 or stride == other_stride for size, stride, other_stride in steps)


def _take_turns(rows: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tokens lie between each other's, as slices of one fused buffer do (never True where
    two overlap)."""
    if rows.stride() != other.stride() or rows.stride(0) <= 0:
        return False
    _, heads, size = rows.shape
    step = rows.stride(0) * rows.itemsize
    width = ((heads - 1) * rows.stride(1) + size) * rows.itemsize
    return width <= (other.data_ptr() - rows.data_ptr()) % step <= step - width
