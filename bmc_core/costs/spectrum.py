"""The spectrum of r for one generation: from a growth per token to all rows up front.

Promises the model's figures for a few r between, the chosen one among them, as plain
data. Knows nothing of terminals and files.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bmc_core.costs.calibration import NATIVE_ROW_MULTIPLE, Attention, Calibration, choose_policy
from bmc_core.costs.model import (
    Costs,
    Prediction,
    Workload,
    best_draft_tokens,
    best_growths,
    predict,
)
from bmc_core.policy import BMCPolicy

SCHEMA = 1


class Choice(NamedTuple):
    """One r. `reserve_bytes`: of rows held and not used, all sequences: mean over the steps, and
    most."""

    r: int
    prediction: Prediction
    reserve_bytes: float
    most_reserve_bytes: float
    chosen: bool


class Spectrum(NamedTuple):
    """What was asked, the choices by rising r, and T* of the closed form.

    `draft_tokens`: how many per step give the most rows per second at the workload's acceptance.
    """

    attention: Attention
    work: Workload
    costs: Costs
    row_bytes: int
    choices: list[Choice]
    best_growths: float
    draft_tokens: int

    @property
    def chosen(self) -> Choice:
        return next(choice for choice in self.choices if choice.chosen)


def spectrum(
    found: Calibration,
    attention: Attention,
    *,
    prompt_rows: int,
    new_rows: int,
    batch_size: int,
    draft_tokens: int = 0,
    acceptance: float = 0.0,
    finely: bool = False,
) -> Spectrum:
    """Prices the powers of two, the chosen r and all rows up front.

    Args:
        attention: the path that is priced, see `Calibration.costs`.
        finely: four r per doubling, for a picture.

    Raises:
        ValueError: an argument out of range, or a path that this machine cannot take.
    """
    costs = found.costs(attention, batch_size, prompt_rows + new_rows)
    multiple = NATIVE_ROW_MULTIPLE if attention == "native" else 1
    work = Workload(prompt_rows, new_rows, batch_size, draft_tokens, acceptance, multiple)
    chosen = choose_policy(costs, work, True).r
    steps = 4 if finely else 1
    grid = {round(2 ** (i / steps)) for i in range(steps * work.limit.bit_length() + 1)}
    rows = sorted({r for r in grid if r < work.limit} | {chosen, max(1, work.limit)})
    row_bytes = found.geometry.row_bytes * batch_size
    choices = []
    for r in rows:
        result = predict(BMCPolicy(r=r), work, costs)
        mean, most = row_bytes * result.mean_spare_rows, row_bytes * result.most_spare_rows
        choices.append(Choice(r, result, mean, most, r == chosen))
    return Spectrum(
        attention,
        work,
        costs,
        row_bytes,
        choices,
        best_growths(work, costs),
        best_draft_tokens(work, costs),
    )


def document(plan: Spectrum, found: Calibration) -> dict[str, Any]:
    """The spectrum as plain data.

    {"schema": 1, "geometry": {...}, "threads", "attention", "workload": {...},
     "costs": {c_copy, c_row, c_read, c_alloc, growth_curve, step_curve}, "r", "T", "T_star",
     "draft_tokens", "spectrum": [{r, growths, seconds, copy_seconds, padding_seconds, read_seconds,
     step_seconds, mean_spare_rows, most_spare_rows, reserve_bytes, most_reserve_bytes, chosen}]}
    """
    geometry = found.geometry
    names = (
        *("growths", "seconds", "copy_seconds", "padding_seconds", "read_seconds"),
        *("step_seconds", "mean_spare_rows", "most_spare_rows"),
    )
    return {
        "schema": SCHEMA,
        "geometry": {
            **{name: getattr(geometry, name) for name in geometry.__dataclass_fields__},
            "dtype": str(geometry.dtype),
        },
        "threads": found.threads,
        "attention": plan.attention,
        "workload": dict(vars(plan.work)),
        "costs": dict(vars(plan.costs)),
        "r": plan.chosen.r,
        "T": plan.chosen.prediction.growths,
        "T_star": plan.best_growths,
        "draft_tokens": plan.draft_tokens,
        "spectrum": [
            {
                "r": choice.r,
                **{name: getattr(choice.prediction, name) for name in names},
                "reserve_bytes": choice.reserve_bytes,
                "most_reserve_bytes": choice.most_reserve_bytes,
                "chosen": choice.chosen,
            }
            for choice in plan.choices
        ],
    }
