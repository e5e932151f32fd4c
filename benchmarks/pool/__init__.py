"""`python -m benchmarks pool`: block tables of a KV pool that was used over and over."""
