"""Random numbers of requests with a ``seed`` whose prompt is computed in parts.

vLLM draws a token for every request in every step. That of an unfinished prompt is thrown away,
and the request's generator is then set back by four numbers: a CUDA generator can do that, a CPU
generator ends the engine instead ("CPU Generator does not use offset").

Promises that a generator draws for tokens that are kept and for no others, so that a seed gives
the same tokens however the prompt was cut. Knows nothing of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def only_for_kept_tokens(model_runner: Any) -> Iterator[None]:
    """Takes the generators of requests whose token will be discarded out of the batch.

    Args:
        model_runner: vLLM's GPUModelRunner or a subclass, between a step's forward pass and its
            sampling.
    """
    batch = model_runner.input_batch
    discarded = np.flatnonzero(model_runner.discard_request_mask.np[: batch.num_reqs])
    hidden = {
        index: batch.generators.pop(index)
        for index in discarded.tolist()
        if index in batch.generators
    }
    try:
        yield
    finally:
        batch.generators.update(hidden)
