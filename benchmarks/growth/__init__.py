"""`python -m benchmarks growth`: the r that the model picks against measured times."""
