"""Drawing tokens from rows of logits, and verifying draft tokens, in native code.

Promises: logits are read as they are, in one pass a row (two and more only where top-k or top-p
must be found), and never changed but by `keep_top`; a token depends on its row, its request's
settings and its seed, not on the other rows, the number of draft tokens or of threads. So the
tokens of a request's seeds are the same with draft tokens and without, unless drafts come with
probabilities: those are accepted with min(1, target / draft), and what replaces a rejected one is
drawn from what the draft makes too little of (Leviathan, Kalman and Matias 2023).

Knows nothing of frameworks, random generators and penalties.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from bmc_core import native
from bmc_core.attention import DTYPES
from bmc_core.checks import check_cpu_tensor

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


class RequestSettings(NamedTuple):
    """What the requests of a batch ask for, `[requests]` each.

    Attributes:
        temperature: float32; below 1e-5 a request takes the first of its largest logits. None: all
            do.
        top_k: int32; below 1, or the vocabulary and more: all tokens. None: nobody asks.
        top_p: float32; 1 and more: all tokens. None: nobody asks.
    """

    temperature: torch.Tensor | None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None


class Drafts(NamedTuple):
    """The draft tokens of a batch, those of one request after those of the one before.

    Attributes:
        token_ids: `[draft tokens]` int32; outside the vocabulary (-1): rejected.
        ends: `[requests]` int32, draft tokens of all requests up to each.
        target_rows: `[draft tokens]` int32, the row of the logits that each is verified against.
        bonus_rows: `[requests]` int32, the row behind each request's last draft token.
        longest: draft tokens that a request has at most.
        probs: `[draft tokens, vocabulary]` float32, what each was drawn from; None: the drafter
            left nothing to chance.
    """

    token_ids: torch.Tensor
    ends: torch.Tensor
    target_rows: torch.Tensor
    bonus_rows: torch.Tensor
    longest: int
    probs: torch.Tensor | None = None


def verify(
    logits: torch.Tensor, settings: RequestSettings, drafts: Drafts, seeds: torch.Tensor | None
) -> torch.Tensor:
    """The tokens of one step of speculative sampling.

    Args:
        logits: `[rows, vocabulary]`, float32, float16 or bfloat16, last dimension contiguous.
        seeds: `[draft tokens + requests]` int64, one for each position, a request's after those of
            the one before; None where all take the largest logit.

    Returns:
        `[requests, longest + 1]` int32: the accepted draft tokens of each request and one token
        more, then -1.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing was drawn.
    """
    requests, count = drafts.ends.shape[0], drafts.token_ids.shape[0]
    rows = _logit_rows(logits)
    tokens = torch.empty((requests, drafts.longest + 1), dtype=torch.int32)
    native.module().verify(
        *rows,
        _DTYPE_CODES[logits.dtype],
        *_settings(settings, requests),
        requests,
        _vector("target_rows", drafts.target_rows, torch.int32, count),
        _vector("bonus_rows", drafts.bonus_rows, torch.int32, requests),
        _vector("ends", drafts.ends, torch.int32, requests),
        _vector("token_ids", drafts.token_ids, torch.int32, count),
        _draft_probs(drafts.probs, count, logits.shape[1]),
        count,
        _vector("seeds", seeds, torch.int64, count + requests),
        tokens.data_ptr(),
        drafts.longest + 1,
    )
    return tokens


def sample(
    logits: torch.Tensor, settings: RequestSettings, seeds: torch.Tensor | None
) -> torch.Tensor:
    """One token for each row, `[rows]` int32; see `verify`.

    Args:
        seeds: `[rows]` int64.
    """
    rows = logits.shape[0]
    none = torch.zeros(rows, dtype=torch.int32)
    drafts = Drafts(none[:0], none, none[:0], torch.arange(rows, dtype=torch.int32), 0)
    return verify(logits, settings, drafts, seeds).view(-1)


def keep_top(logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> None:
    """Sets the logits of tokens outside top-k and top-p to -inf, in place.

    Args:
        logits: `[rows, vocabulary]` float32, the last dimension contiguous, rows apart.
        top_k, top_p: one value for each row, as in `RequestSettings`.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing was changed.
    """
    if logits.dtype != torch.float32:
        raise TypeError(f"logits has dtype {logits.dtype}; allowed: {torch.float32}")
    address, stride, rows, vocab = _logit_rows(logits)
    if rows > 1 and stride < vocab:
        raise ValueError(f"logits has strides {logits.stride()}; allowed: rows apart")
    _, k, p = _settings(RequestSettings(None, top_k, top_p), rows)
    native.module().keep_top(address, stride, rows, vocab, k, p)


def _logit_rows(logits: torch.Tensor) -> tuple[int, int, int, int]:
    if logits.dtype not in _DTYPE_CODES:
        raise TypeError(f"logits has dtype {logits.dtype}; allowed: {DTYPES}")
    address, _ = check_cpu_tensor("logits", logits, logits.dtype, 2)
    stride, inner = logits.stride()
    if inner != 1 and logits.shape[1] > 1:
        raise ValueError(
            f"logits has strides {(stride, inner)}; allowed: a contiguous last dimension"
        )
    return address, stride, logits.shape[0], logits.shape[1]


def _settings(settings: RequestSettings, requests: int) -> tuple[int, int, int]:
    return (
        _vector("temperature", settings.temperature, torch.float32, requests),
        _vector("top_k", settings.top_k, torch.int32, requests),
        _vector("top_p", settings.top_p, torch.float32, requests),
    )


def _vector(name: str, values: torch.Tensor | None, dtype: torch.dtype, length: int) -> int:
    """Address of that many values side by side; 0 for None."""
    if values is None:
        return 0
    address, _ = check_cpu_tensor(name, values, dtype, 1)
    if values.shape[0] != length or not values.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and strides {values.stride()}; "
            f"allowed: {length} values side by side"
        )
    return address


def _draft_probs(probs: torch.Tensor | None, count: int, vocab: int) -> int:
    if probs is None:
        return 0
    address, _ = check_cpu_tensor("probs", probs, torch.float32, 2)
    if tuple(probs.shape) != (count, vocab) or not probs.is_contiguous():
        raise ValueError(
            f"probs has shape {tuple(probs.shape)} and strides {probs.stride()}; "
            f"allowed: {(count, vocab)}, contiguous"
        )
    return address
