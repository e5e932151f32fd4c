"""What sampling should give, by sorting and in double precision."""

from __future__ import annotations

import numpy as np
import torch

STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def gumbel_noise(seed: int, vocab: int) -> torch.Tensor:
    """`[vocab]` float64, of one row."""
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed], dtype=np.uint64))
        bits = _mix(key + np.arange(1, vocab + 1, dtype=np.uint64) * STEP) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(-np.log(-np.log(uniform)))


def kept(row: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Which tokens of a row top-k and top-p keep; of equal ones the later first."""
    keep = torch.isfinite(row)
    if 0 < top_k < len(row):
        keep &= row >= row.topk(top_k).values[-1]
    if top_p < 1.0:
        order = row.flip(0).argsort(descending=True, stable=True)
        order = len(row) - 1 - order
        probabilities = row.double().masked_fill(~keep, -torch.inf).softmax(0)[order]
        before = probabilities.cumsum(0) - probabilities
        keep[order[before >= top_p]] = False
        keep[order[0]] = True
    return keep


def drawn(row: torch.Tensor, seed: int, top_k: int = 0, top_p: float = 1.0) -> int:
    """The token of a row that has been divided by its temperature."""
    score = row.double() + gumbel_noise(seed, len(row))
    return int(score.masked_fill(~kept(row, top_k, top_p), -torch.inf).argmax())


def total_variation(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Between what was drawn and what should have been."""
    counts = torch.bincount(tokens.long(), minlength=len(probabilities)).double()
    return float((counts / counts.sum() - probabilities.double()).abs().sum() / 2)
