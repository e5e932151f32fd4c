"""Comparative benchmarks: `python -m benchmarks kernel` and `python -m benchmarks step`.

Promises that every number stands beside its peers' and beside this machine's measured ceilings,
all from one run, and that a system whose answer is wrong fails the run. Knows nothing of how
any of the systems works inside.
"""
