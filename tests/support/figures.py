"""Tiny geometries, and the costs of a machine that does not exist."""

import torch

from bmc_core.costs.geometry import Geometry
from bmc_core.costs.measure import AttentionCost, Measured

TINY = Geometry(2, 2, 1, 32, torch.float32, 64, 128)
ODD = Geometry(2, 2, 1, 24, torch.float32)  # not a head size of the native kernel
MIB = 1 << 20

FIGURES = Measured(
    growth_rows=((1 * MIB, 1e-4), (8 * MIB, 1e-3)),
    growth_packed=((1 * MIB, 2e-4), (8 * MIB, 2e-3)),
    sdpa=(AttentionCost(1e-5, 1e-10, 0.0), AttentionCost(1e-5, 1e-10, 0.0)),
    padded=(AttentionCost(1e-5, 1e-10, 1e-10), AttentionCost(1e-5, 1e-10, 1e-10)),
    native=(AttentionCost(1e-5, 5e-11, 1e-13), AttentionCost(1e-5, 5e-11, 1e-13)),
    steps=((1, 1e-3), (16, 2e-3)),
)
