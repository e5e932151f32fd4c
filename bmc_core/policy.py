"""How many rows a KV cache holds: the growth policies of BMC.

Promises one answer: given the rows that are held and the rows that are needed, how many to hold
from now on. Knows nothing of tensors, blocks, layers or any framework; a caller whose storage
comes in blocks rounds the answer up to whole blocks. What a policy costs is
`bmc_core.costs.model`'s.

``r`` and ``T`` are the paper's (arXiv 2511.12031): the rows that one growth adds, and the number of
growths in which a sequence reaches its last row. ``N`` is here the ``limit``: all rows that a
sequence can reach, its prompt included.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Protocol

DEFAULT_R = 128
"""Rows per growth where the caller names none."""

DEFAULT_C = 4.0
"""Factor of r(n) = c sqrt(n) where the caller names none: r(1024) is `DEFAULT_R`."""

MINIMUM_GROWTH = 16
"""Fewest rows that a growing policy adds where the caller names none: the native kernel's tile."""


class GrowthPolicy(Protocol):
    """What a store asks of a policy; `BMCPolicy` is one."""

    def rows_to_hold(self, held: int, needed: int, limit: int | None = None) -> int: ...


class _Kind(Enum):
    CONSTANT = "constant"
    DIVIDED = "divided"
    GROWING = "growing"
    AUTO = "auto"


class BMCPolicy:
    """When a cache grows, and by how much.

    ``BMCPolicy(r=64)``
        constant r: the cache grows by whole multiples of 64 rows. ``BMCPolicy()`` is
        ``BMCPolicy(r=128)``, ``BMCPolicy.per_token()`` is ``BMCPolicy(r=1)``.
    ``BMCPolicy(T=16)``
        r = ceil(limit / 16): from an empty cache at most 16 growths reach ``limit``, the prompt's
        included. Needs a limit. ``BMCPolicy.up_front()`` is ``BMCPolicy(T=1)``.
    ``BMCPolicy.growing(c=4.0)``
        r(n) = c sqrt(n): for a sequence of unknown length. O(sqrt(N)) growths to N rows.
    ``BMCPolicy("auto")``
        not decided yet: `bmc_core.auto_policy` turns it into one of the above by what this machine
        was measured to do. Used as it is, it behaves as ``BMCPolicy.growing()``.

    Two policies are equal when they give the same answers by the same setting.

    Args:
        r: rows per growth, or "auto".
        T: growths to the limit; not together with ``r``.

    Raises:
        TypeError: ``r`` or ``T`` is not an int (or ``r`` "auto").
        ValueError: not positive, or both are given, or another string than "auto".
    """

    __slots__ = ("_T", "_c", "_kind", "_minimum", "_r")

    def __init__(self, r: int | str | None = None, *, T: int | None = None) -> None:  # noqa: N803
        self._r = self._T = self._minimum = 0
        self._c = 0.0
        if isinstance(r, str):
            if r != "auto":
                raise ValueError(f'r={r!r}: expected a positive int (rows per growth) or "auto"')
            if T is not None:
                raise ValueError(f'r="auto" and T={T}: expected one of them')
            self._kind, self._c, self._minimum = _Kind.AUTO, DEFAULT_C, MINIMUM_GROWTH
        elif T is not None:
            if r is not None:
                raise ValueError(f"r={r} and T={T}: expected one of them")
            self._kind, self._T = _Kind.DIVIDED, _positive("T", T, "growths to the limit")
        else:
            self._kind = _Kind.CONSTANT
            self._r = _positive("r", DEFAULT_R if r is None else r, "rows per growth")

    @classmethod
    def parse(
        cls,
        value: object,
        *,
        name: str = "policy",
        T: int | None = None,  # noqa: N803
        unset: GrowthPolicy | None = None,
    ) -> GrowthPolicy:
        """The policy that a user's setting means.

        transformers' and DeepSpeed's settings come through here, so that both take the same values.
        (vLLM's block tables grow without a copy: there r is an int, and nothing else is meant.)

        Args:
            value: a policy (anything with `rows_to_hold`, returned as it is), an int r, "auto", or
                None: not given.
            name: of the setting, for errors.
            T: the value of the setting T beside it; None: not given, or there is no such setting.
            unset: the policy where nothing is given; None: something must be.

        Raises:
            TypeError: a value of another type, or no value where there must be one.
            ValueError: an int that is not positive, another string than "auto", or both are given.
        """
        if T is not None:
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} and T={T!r} are both given; allowed: one of them"
                )
            return cls(T=T)
        if value is None and unset is not None:
            return unset
        if isinstance(value, str) and value == "auto":
            return cls("auto")
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, int) and is_number and value > 0:
            return cls(r=value)
        rows_to_hold = None if isinstance(value, type) else getattr(value, "rows_to_hold", None)
        if callable(rows_to_hold):
            return value  # type: ignore[return-value]
        kind = ValueError if is_number or isinstance(value, str) else TypeError
        raise kind(f'{name}={value!r}: allowed are a BMCPolicy, an int r > 0 or "auto"')

    @classmethod
    def per_token(cls) -> BMCPolicy:
        """r = 1: a growth, and a copy of all rows, for every new row. One end of the spectrum."""
        return cls(r=1)

    @classmethod
    def up_front(cls) -> BMCPolicy:
        """T = 1: the first growth holds ``limit`` rows. The other end; needs a limit."""
        return cls(T=1)

    @classmethod
    def growing(cls, c: float = DEFAULT_C, minimum: int = MINIMUM_GROWTH) -> BMCPolicy:
        """r(n) = max(minimum, ceil(c sqrt(n))), n being the rows needed.

        Args:
            c: factor, positive. The best one is sqrt(2 c_copy / c_row), see `bmc_core.costs.model`.
            minimum: fewest rows added.

        Raises:
            TypeError, ValueError: not a positive finite number; not a positive int.
        """
        if isinstance(c, bool) or not isinstance(c, (int, float)):
            raise TypeError(f"c={c!r}: expected a positive number (r(n) = c sqrt(n))")
        if not (math.isfinite(c) and c > 0):
            raise ValueError(f"c={c}: expected a positive number (r(n) = c sqrt(n))")
        policy = cls("auto")
        policy._kind, policy._c = _Kind.GROWING, float(c)
        policy._minimum = _positive("minimum", minimum, "fewest rows per growth")
        return policy

    @property
    def is_auto(self) -> bool:
        """Whether it is still to be decided from measured costs."""
        return self._kind is _Kind.AUTO

    @property
    def needs_limit(self) -> bool:
        """Whether `rows_to_hold` wants a limit."""
        return self._kind is _Kind.DIVIDED

    @property
    def r(self) -> int:
        """Rows per growth of a constant-r policy; AttributeError for the others."""
        if self._kind is not _Kind.CONSTANT:
            raise AttributeError(f"{self} has no constant r; ask rows_per_growth")
        return self._r

    @property
    def T(self) -> int:  # noqa: N802
        """Growths to the limit of a ``BMCPolicy(T=...)``; AttributeError for the others."""
        if self._kind is not _Kind.DIVIDED:
            raise AttributeError(f"{self} has no constant T")
        return self._T

    def rows_per_growth(self, needed: int, limit: int | None = None) -> int:
        """r where ``needed`` rows are the first that do not fit, not cut at ``limit`` yet.

        Raises:
            ValueError: the policy needs a limit and there is none.
        """
        if self._kind is _Kind.CONSTANT:
            return self._r
        if self._kind is _Kind.DIVIDED:
            if limit is None:
                raise ValueError(
                    f"{self} needs limit, the rows that a sequence can reach; got limit=None"
                )
            return max(1, -(-limit // self._T))
        return max(self._minimum, math.ceil(self._c * math.sqrt(needed)))

    def rows_to_hold(self, held: int, needed: int, limit: int | None = None) -> int:
        """Rows to hold in total, so that ``needed`` fit.

        Args:
            held: rows held now, >= 0.
            needed: rows that must fit, >= 0.
            limit: rows that the sequence can never exceed; None when there is no such bound.

        Returns:
            ``held`` when it is enough; else ``held`` plus the fewest growths of ``r`` rows that
            hold ``needed`` (r(n): ``needed - 1`` plus one growth), cut at ``limit`` (but never
            below ``needed``).

        Raises:
            ValueError: a negative argument, ``needed`` above ``limit``, or no limit where the
                policy needs one.
        """
        if held < 0 or needed < 0:
            raise ValueError(f"held={held}, needed={needed}: expected row counts >= 0")
        if limit is not None and needed > limit:
            raise ValueError(f"needed={needed} rows exceed limit={limit}")
        if needed <= held:
            return held
        r = self.rows_per_growth(needed, limit)
        if self._kind in (_Kind.GROWING, _Kind.AUTO):
            rows = needed - 1 + r
        else:
            rows = held + -(-(needed - held) // r) * r
        return rows if limit is None else min(rows, limit)

    def _key(self) -> tuple[object, ...]:
        return self._kind, self._r, self._T, self._c, self._minimum

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, BMCPolicy) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        if self._kind is _Kind.CONSTANT:
            return f"BMCPolicy(r={self._r})"
        if self._kind is _Kind.DIVIDED:
            return f"BMCPolicy(T={self._T})"
        if self._kind is _Kind.AUTO:
            return 'BMCPolicy("auto")'
        return f"BMCPolicy.growing(c={self._c:g}, minimum={self._minimum})"


def _positive(name: str, value: object, meaning: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected a positive int ({meaning})")
    if value <= 0:
        raise ValueError(f"{name}={value}: expected a positive int ({meaning})")
    return value
