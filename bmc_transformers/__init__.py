"""BMC for Hugging Face transformers: a cache that grows by chunks, and the native attention kernel.

Importing it changes nothing in transformers; `enable` and `register_attention` do.
"""

from bmc_transformers.attention import register_attention
from bmc_transformers.cache import BMCCache
from bmc_transformers.generation import disable, enable, is_enabled, speculation_stats
from bmc_transformers.speculation import SpeculationStats
from bmc_transformers.stats import CacheStats

__all__ = [
    "BMCCache",
    "CacheStats",
    "SpeculationStats",
    "disable",
    "enable",
    "is_enabled",
    "register_attention",
    "speculation_stats",
]
