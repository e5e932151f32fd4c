"""`python -m benchmarks step`: a whole decode step of vLLM, BMC against CPU_ATTN."""
