"""The attention operators that `python -m benchmarks kernel` times side by side, one file each."""

from benchmarks.kernel.operators.base import Arena, Operator, Trial, Unusable
from benchmarks.kernel.operators.bmc import BMC
from benchmarks.kernel.operators.cpu_attn import CPUAttn
from benchmarks.kernel.operators.sdpa import Sdpa
from benchmarks.kernel.operators.slabpool import SlabPool

__all__ = ["BMC", "Arena", "CPUAttn", "Operator", "Sdpa", "SlabPool", "Trial", "Unusable"]
