"""From "auto" to a policy for one `generate`: what the machine was measured to do decides."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from bmc_core.log import log_once
from bmc_core.policy import GrowthPolicy

logger = logging.getLogger("bmc_transformers")


def policy_for(
    model: PreTrainedModel,
    policy: GrowthPolicy,
    *,
    batch_size: int,
    prompt_rows: int,
    total_rows: int | None,
    native: bool,
    draft_tokens: int = 0,
) -> GrowthPolicy:
    """The policy itself, or for "auto" the one that calibration gives.

    Args:
        batch_size: sequences, beams included. `prompt_rows`: 0 where not known.
        total_rows: rows at the end; None: not known.
        native: whether the native kernel attends, which skips spare rows.
        draft_tokens: how many tokens a step verifies besides the one that it generates.
    """
    if not getattr(policy, "is_auto", False):
        return policy
    from bmc_core.costs.calibration import auto_policy
    from bmc_core.costs.geometry import Geometry

    try:
        geometry = Geometry.from_config(model.config.get_text_config(decoder=True), model.dtype)
    except ValueError as error:
        log_once(logger, f'bmc_transformers: policy "auto" grows without calibration: {error}')
        return policy
    return auto_policy(
        geometry,
        batch_size=batch_size,
        prompt_rows=prompt_rows,
        total_rows=total_rows,
        attention="native" if native else "sdpa",
        draft_tokens=draft_tokens,
    )
