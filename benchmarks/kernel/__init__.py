"""`python -m benchmarks kernel`: one layer's attention, BMC, CPU_ATTN and sdpa in turns."""
