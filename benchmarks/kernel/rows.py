"""One operator on one case: what was timed, and what it says under this machine's ceilings.

Promises figures that follow from the median. Knows nothing of how it was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.kernel.cases import Case
from benchmarks.lib.ceilings import Ceilings, Floor, floor
from benchmarks.lib.timing import Timing


class Row(NamedTuple):
    """One operator on one case.

    Attributes:
        timing: of the calls.
        sets: rotating sets.
        error: relative to the float32 reference, the larger of before and after; `ok`: allowed.
        ratios: title of a peer -> its median over this one's.
        read_gb_s, gemm_gflops: ceilings at the same threads (and dtype); `gemm_told`: whether the
            second says what the machine can do.
    """

    case: Case
    system: str
    title: str
    isa: str
    threads: int
    timing: Timing
    sets: int
    error: float
    ok: bool
    ratios: dict[str, float]
    read_gb_s: float = 0.0
    gemm_gflops: float = 0.0
    gemm_told: bool = True

    def under(self, ceilings: Ceilings) -> Row:
        """The same row under those ceilings."""
        gemm = ceilings.gemm(self.threads, self.case.dtype)
        return self._replace(
            read_gb_s=ceilings.read(self.threads).rate,
            gemm_gflops=gemm.rate,
            gemm_told=gemm.told,
        )

    @property
    def set_bytes(self) -> int:
        """Of K and V in one rotating set."""
        return self.case.set_bytes

    @property
    def gb_s(self) -> float:
        """KV bytes over the median, 1e9 bytes per second."""
        return self.case.kv_bytes / self.timing.ms / 1e6

    @property
    def gflops(self) -> float:
        """Floating-point operations over the median, 1e9 per second; 0 for a write."""
        return self.case.flops / self.timing.ms / 1e6

    @property
    def floor(self) -> Floor:
        """What the case takes at least here; a write is held against the read bandwidth."""
        rates = (self.read_gb_s, self.gemm_gflops, self.gemm_told)
        return floor(self.case.kv_bytes, self.case.flops, *rates)

    @property
    def share(self) -> float | None:
        """Of the ceiling of this kind of case; None for a write."""
        if self.case.kind == "write":
            return None
        if self.case.reads_bound:
            return self.gb_s / self.read_gb_s
        return self.gflops / self.gemm_gflops
