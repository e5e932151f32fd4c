"""`python -m benchmarks speculation`: draft tokens with BMC and without it."""
