"""What this machine is: its processor and cores, its memory, and what others take of it.

Promises one answer to each question for every package of this repository, without importing torch.
Knows nothing of models, caches or frameworks.
"""
