"""`python -m benchmarks sampling`: a step's sampling, BMC's samplers beside vLLM's own."""
