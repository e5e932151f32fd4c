"""The vLLM plugin of BMC: the attention backend ``BMC`` and what it needs around it.

One file per vLLM concept, named as vLLM names it: ``plugin`` (entry point), ``distribution``
(package metadata), ``platform``, ``config``, ``attention`` (backend), ``kv_cache_interface``
(specs), ``kv_cache_manager`` (block managers), ``scheduler``, ``worker``, ``memory`` (the pool's
pages), ``residency`` (how many of them are in memory), ``metrics``.

Importing this package imports neither vLLM nor torch.
"""
