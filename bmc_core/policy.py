"""How many rows a KV cache holds: the growth policy of BMC.

Promises one answer: given the rows that are held and the rows that are needed, how many to hold
from now on. Knows nothing of tensors, blocks, layers or any framework; a caller whose storage
comes in blocks rounds the answer up to whole blocks.

``r`` is the paper's (arXiv 2511.12031): the rows that one growth adds.
"""

from __future__ import annotations

DEFAULT_R = 128
"""Rows per growth where the caller names none."""


class BMCPolicy:
    """Constant ``r``: a cache grows by whole multiples of ``r`` rows.

    Raises:
        TypeError: ``r`` is not an int.
        ValueError: ``r`` is not positive.
    """

    def __init__(self, r: int = DEFAULT_R) -> None:
        if isinstance(r, bool) or not isinstance(r, int):
            raise TypeError(f"r={r!r}: expected a positive int (rows per growth)")
        if r <= 0:
            raise ValueError(f"r={r}: expected a positive int (rows per growth)")
        self.r = r

    def rows_to_hold(self, held: int, needed: int, limit: int | None = None) -> int:
        """Rows to hold in total, so that ``needed`` fit.

        Args:
            held: rows held now, >= 0.
            needed: rows that must fit, >= 0.
            limit: rows that the sequence can never exceed; None when there is no such bound.

        Returns:
            ``held`` when it is enough; else ``held`` plus the fewest growths of ``r`` rows that
            hold ``needed``, cut at ``limit`` (but never below ``needed``).

        Raises:
            ValueError: a negative argument, or ``needed`` above ``limit``.
        """
        if held < 0 or needed < 0:
            raise ValueError(f"held={held}, needed={needed}: expected row counts >= 0")
        if limit is not None and needed > limit:
            raise ValueError(f"needed={needed} rows exceed limit={limit}")
        if needed <= held:
            return held
        growths = -(-(needed - held) // self.r)
        rows = held + growths * self.r
        return rows if limit is None else min(rows, limit)

    def __repr__(self) -> str:
        return f"BMCPolicy(r={self.r})"
