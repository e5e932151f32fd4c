"""How many draft tokens each request verifies in the next step, and how many the drafter makes.

`costs` is what a step takes, `acceptance` what became of earlier draft tokens, `lengths` the
choice that follows from both, `parking` when a draft that does not pay is asked again, and
`controller` all of them over the steps of a serving loop. Knows no framework and no torch.
"""

from bmc_core.speculation.controller import DraftRequest, SpeculationController
from bmc_core.speculation.costs import StepCosts, StepTimes
from bmc_core.speculation.lengths import Choice, choose_lengths

__all__ = [
    "Choice",
    "DraftRequest",
    "SpeculationController",
    "StepCosts",
    "StepTimes",
    "choose_lengths",
]
