"""`python -m benchmarks overhead`: what a layer of vLLM costs before anything is computed."""
