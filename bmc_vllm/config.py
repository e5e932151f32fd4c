"""What a user can set: the key ``bmc`` of vLLM's ``additional_config``.

Promises one validated, frozen object; every refusal names the setting, the value and what is
allowed. Knows nothing of how the settings are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from bmc_core.policy import DEFAULT_R

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "bmc"
AUTO: Literal["auto"] = "auto"
FIXED: Literal["fixed"] = "fixed"


@dataclass(frozen=True)
class BMCConfig:
    """Settings of the BMC backend.

    Attributes:
        r: rows per growth, a positive multiple of the block size; ``"auto"``: measured when the
            engine starts, see `auto_r`. None, where it is left out: 128. The last two are rounded
            up to whole blocks.
        release_free_memory: take memory for the pool only where it is used, and give the pages of
            freed blocks that hold no cached prefix back to the operating system. Off by default:
            the memory is then promised to nobody, re-used pages cost a page fault each, and the
            pool is not on huge pages, which attention reads faster.
        draft_length: of speculative decoding. ``"auto"``: as many draft tokens per request and
            step as pay, up to ``num_speculative_tokens``; ``"fixed"``: always so many, where there
            are spare rows for them.
        prompt_lookup_max: beside a draft model, copy drafts from the request's text where so many
            of its last tokens, or `prompt_lookup_min`, occurred before. None: no copied drafts.
        prompt_lookup_min: least tokens that must match; None: as many as `prompt_lookup_max`.
    """

    r: int | Literal["auto"] | None = None
    release_free_memory: bool = False
    draft_length: Literal["auto", "fixed"] = AUTO
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    @property
    def prompt_lookup(self) -> tuple[int, int] | None:
        """Least and most tokens that a copied draft's beginning must match; None: none."""
        if self.prompt_lookup_max is None:
            return None
        return self.prompt_lookup_min or self.prompt_lookup_max, self.prompt_lookup_max

    @classmethod
    def from_dict(cls, settings: Any) -> BMCConfig:
        """Parses the value of ``additional_config["bmc"]``; raises ValueError on anything odd."""
        if settings is None:
            return cls()
        allowed = ", ".join(f.name for f in fields(cls))
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"additional_config[{KEY!r}]={settings!r}: expected a dict with the keys {allowed}"
            )
        unknown = sorted(str(key) for key in settings if key not in {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"additional_config[{KEY!r}] has the unknown keys {', '.join(unknown)}; "
                f"allowed: {allowed}"
            )
        r = settings.get("r")
        valid = r == AUTO or (isinstance(r, int) and not isinstance(r, bool) and r > 0)
        if "r" in settings and not valid:
            raise ValueError(
                f"additional_config[{KEY!r}]['r']={r!r}: expected a positive multiple of the block "
                f"size (an int, in rows; default {DEFAULT_R}) or {AUTO!r}"
            )
        release = settings.get("release_free_memory", False)
        if not isinstance(release, bool):
            raise ValueError(
                f"additional_config[{KEY!r}]['release_free_memory']={release!r}: "
                "expected true or false"
            )
        draft_length = settings.get("draft_length", AUTO)
        if draft_length not in (AUTO, FIXED):
            raise ValueError(
                f"additional_config[{KEY!r}]['draft_length']={draft_length!r}: expected {AUTO!r} "
                f"(the default) or {FIXED!r}"
            )
        lookup_max, lookup_min = _lookup(settings)
        return cls(
            r=r,
            release_free_memory=release,
            draft_length=draft_length,
            prompt_lookup_max=lookup_max,
            prompt_lookup_min=lookup_min,
        )

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> BMCConfig:
        """Parses ``vllm_config.additional_config``; raises ValueError on anything odd."""
        additional = vllm_config.additional_config
        if not isinstance(additional, Mapping):
            raise ValueError(
                f"additional_config is a {type(additional).__name__}: attention backend BMC reads "
                f"its settings from the key {KEY!r} of a dict"
            )
        return cls.from_dict(additional.get(KEY))

    def check_block_size(self, block_size: int) -> None:
        """Raises ValueError unless ``r`` is a whole number of blocks of ``block_size`` rows."""
        if isinstance(self.r, int) and self.r % block_size:
            below = self.r // block_size * block_size
            near = [str(rows) for rows in (below, below + block_size) if rows]
            raise ValueError(
                f"additional_config[{KEY!r}]['r']={self.r}: expected a positive multiple of the "
                f"block size ({block_size}), for example {' or '.join(near)}"
            )

    def rows(self, block_size: int) -> int:
        """Rows per growth: ``r``, unless it is measured, in whole blocks, rounded up.

        A given ``r`` is a multiple of the block size that was configured; with hybrid models vLLM
        makes blocks larger afterwards, to the size of a layer's state.
        """
        rows = self.r if isinstance(self.r, int) else DEFAULT_R
        return -(-rows // block_size) * block_size


def _lookup(settings: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """`prompt_lookup_max` and `prompt_lookup_min`; raises ValueError on anything odd."""
    most, least = settings.get("prompt_lookup_max"), settings.get("prompt_lookup_min")
    for name, value in (("prompt_lookup_max", most), ("prompt_lookup_min", least)):
        valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value is not None and not valid:
            raise ValueError(
                f"additional_config[{KEY!r}][{name!r}]={value!r}: expected a positive int (tokens)"
            )
    if least is not None and (most is None or least > most):
        raise ValueError(
            f"additional_config[{KEY!r}]['prompt_lookup_min']={least}: expected at most "
            f"prompt_lookup_max ({most})"
        )
    return most, least
