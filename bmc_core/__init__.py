"""Framework-neutral core of BMC: growth policy, attention over r-row chunks, native kernels.

Knows torch tensors and nothing of vLLM, transformers or DeepSpeed; importing it imports none of
them.
"""
