"""Which instruction sets both sides of a comparison use, in the names of `bmc_core.native`.

Promises what is used now, a forced set included. Knows nothing of what is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from bmc_core import native


class InstructionSets(NamedTuple):
    """Of this project's kernels, and of the peers': CPU_ATTN's build, and torch's oneDNN.

    ours: "none" where the native module does not load.
    """

    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"BMC {self.ours}, peers {self.theirs}"


def best_of_machine() -> str:
    """What vLLM chooses its build by and oneDNN its products, in BMC's names."""
    if torch.cpu._is_avx512_supported():
        if not torch.cpu._is_avx512_bf16_supported():
            return "avx512"
        return "amx_bf16" if torch.cpu._is_amx_tile_supported() else "avx512_bf16"
    return "avx2" if torch.cpu._is_avx2_supported() else "portable"


def in_use(forced: str | None = None) -> InstructionSets:
    """Of both sides now. `forced`: what a run forces on its peer."""
    ours = "none" if native.load_error() is not None else native.isa()
    return InstructionSets(ours, forced or best_of_machine())
