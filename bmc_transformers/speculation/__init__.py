"""Speculative decoding in `generate`: how many draft tokens, from whom, and what became of them.

transformers verifies the drafts and samples; here are the candidate generators that it asks. The
drafts of a model come from a plain loop over its forwards (`draft_model`), those of a text from
where its end stood before (`lookup`), and `bmc_core.speculation` decides how many are worth it
(`steering`), by what this model's forwards cost here (`measure`). `calls` knows which `generate`
speculates, `settings` what is kept between two of them. Verified rows go into the spare rows of a
BMCCache, and a rejection moves a counter.
"""

from bmc_transformers.speculation.settings import Speculation, SpeculationStats

__all__ = ["Speculation", "SpeculationStats"]
