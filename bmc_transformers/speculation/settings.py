"""What a model that speculates keeps between two calls of `generate`: what it learned.

One controller for each drafter, number of draft tokens and number of threads. Safe for several
threads. A copy of it, or of its model, starts anew.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from bmc_core.log import log_once
from bmc_core.speculation import SpeculationController
from bmc_transformers.speculation.measure import (
    DRAFT_ROWS,
    TARGET_ROWS,
    ForwardCosts,
    forward_costs,
    step_costs,
)
from bmc_transformers.speculation.steering import SpeculationStats, Steering

logger = logging.getLogger("bmc_transformers")

Speculate = Literal["auto", "fixed"]

SECONDS = 1.0
"""For the forwards of the model and its draft model together."""
TARGET_SHARE = 0.8


class Speculation:
    """How a model speculates, and what its calls have learned.

    Args:
        setting: "auto": the controller chooses the number of draft tokens for each round. "fixed":
            it is what `generate` was told.

    Raises:
        ValueError: another setting.
    """

    def __init__(self, setting: Speculate) -> None:
        if setting not in get_args(Speculate):
            raise ValueError(f'speculate={setting!r}: allowed are "auto", "fixed" and None')
        self.setting = setting
        self.stats = SpeculationStats()
        self._lock = threading.RLock()
        self._of_lookup: dict[Any, SpeculationController] = {}
        self._of_assistants: WeakKeyDictionary[Any, dict[Any, SpeculationController]] = (
            WeakKeyDictionary()
        )
        self._costs: WeakKeyDictionary[Any, dict[int, ForwardCosts]] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return Speculation, (self.setting,)

    def steering(
        self, model: PreTrainedModel, assistant: PreTrainedModel | None, most: int
    ) -> Steering:
        """For one `generate`.

        Args:
            assistant: the draft model; None: prompt lookup. most: draft tokens of a round.
        """
        with self._lock:
            known = self._of_lookup
            if assistant is not None:
                known = self._of_assistants.setdefault(assistant, {})
            key = (most, torch.get_num_threads())
            controller = known.get(key)
            if self.setting == "fixed":
                fixed = SpeculationController(None, max_draft_tokens=most, fixed_length=True)
                return Steering(fixed, self.stats, self._lock)
            if controller is not None:
                return Steering(controller, self.stats, self._lock)
            made = SpeculationController(None, max_draft_tokens=most)

            def calibrate(input_ids: torch.Tensor) -> None:
                self._calibrate(made, model, assistant, input_ids)
                known[key] = made

            return Steering(made, self.stats, self._lock, calibrate)

    def _calibrate(
        self,
        controller: SpeculationController,
        model: PreTrainedModel,
        assistant: PreTrainedModel | None,
        input_ids: torch.Tensor,
    ) -> None:
        try:
            seconds = TARGET_SHARE * SECONDS
            target = self._measured(model, input_ids, TARGET_ROWS, seconds)
            draft = None
            if assistant is not None:
                draft = self._measured(assistant, input_ids, DRAFT_ROWS, SECONDS - seconds)
        except Exception as error:
            # Whatever it is that this model's forward wants, `generate` may give it.
            log_once(
                logger,
                "bmc_transformers: draft lengths are learned from the clock alone, because the "
                f"model could not be measured: {error}",
            )
            return
        controller.set_costs(step_costs(target, draft))

    def _measured(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        rows: tuple[int, ...],
        seconds: float,
    ) -> ForwardCosts:
        known = self._costs.setdefault(model, {})
        threads = torch.get_num_threads()
        if threads not in known:
            known[threads] = forward_costs(model, input_ids, rows=rows, seconds=seconds)
        return known[threads]
