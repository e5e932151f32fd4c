"""The systems that `python -m benchmarks kernel` times side by side, one file each."""

from benchmarks.systems.base import Arena, System, Trial, Unusable
from benchmarks.systems.bmc import BMC
from benchmarks.systems.cpu_attn import CPUAttn
from benchmarks.systems.sdpa import Sdpa
from benchmarks.systems.slabpool import SlabPool

__all__ = ["BMC", "Arena", "CPUAttn", "Sdpa", "SlabPool", "System", "Trial", "Unusable"]
