"""The settings of ``kv_policy="bmc"``: what a user writes into ``kv_policy_config``.

Promises what DeepSpeed's own configs promise (pydantic, unknown names refused), with the allowed
values in every refusal. Knows nothing of models or caches.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import Field, model_validator

from bmc_core.policy import BMCPolicy, GrowthPolicy

Rows = Annotated[int, Field(strict=True, ge=1)]


class BMCPolicyConfig(DeepSpeedConfigModel):
    """The value of ``kv_policy_config`` for ``kv_policy="bmc"``.

    Attributes:
        r: rows per growth (the paper's r), or "auto": the policy chooses by this machine's costs.
            "auto" is also what is used where neither ``r`` nor ``T`` is given.
        T: growths over a whole generation (the paper's T), instead of ``r``.
        attention: "bmc" asks for the native kernel, "stock" keeps the model's own attention over
            the growing cache; None takes the kernel where model and device allow it.
        pack_linears: also pack the weights of the model's linear layers for faster decoding.
            Layers that tensor parallelism has split stay as DeepSpeed made them.
        speculate: "auto": the number of draft tokens is decided before each step, "fixed": it is
            what ``generate`` is told; None: speculation is transformers' own. See
            ``bmc_transformers.enable``.
    """

    r: Rows | Literal["auto"] | None = None
    T: Rows | None = None
    attention: Literal["bmc", "stock"] | None = None
    pack_linears: Annotated[bool, Field(strict=True)] = False
    speculate: Literal["auto", "fixed"] | None = None

    def __init__(self, strict: bool = True, **data: Any) -> None:
        # DeepSpeed drops every "auto" unless told otherwise. Here it is a value: dropping it would
        # let r="auto" beside T pass, and every setting accept "auto".
        super().__init__(strict=True, **data)

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, data: Any) -> Any:
        known = cls.model_fields
        unknown = [name for name in data if name not in known] if isinstance(data, dict) else []
        if unknown:
            raise ValueError(
                f"Extra inputs are not permitted: {', '.join(map(repr, unknown))}; "
                f"allowed: {', '.join(known)}"
            )
        return data

    @model_validator(mode="after")
    def _one_of_r_and_t(self) -> BMCPolicyConfig:
        self.policy()
        return self

    def policy(self) -> GrowthPolicy:
        """The growth policy.

        Raises:
            ValueError: ``r`` and ``T`` are both given.
        """
        return BMCPolicy.parse(self.r, name="r", T=self.T, unset=BMCPolicy("auto"))
