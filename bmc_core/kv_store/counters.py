"""What a chunked KV store did and holds: growths, copies and bytes.

Promises exact counts of what the stores asked for, in bytes of their tensors. Knows nothing of what
the allocator rounds up, and nothing of tensors that are not a store's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class KVCounters:
    """Counts of one store, or of all stores of a cache together.

    A growth is more memory for a store that was full. A copy is one time that held rows were
    moved to another place: by a growth, by sliding a window, or because the batch changed.
    """

    growths: int = 0
    copies: int = 0
    rows_copied: int = 0
    bytes_copied: int = 0
    bytes_allocated: int = 0
    bytes_held: int = 0
    bytes_peak: int = 0

    def allocated(self, num_bytes: int) -> None:
        """A tensor of that many bytes came into being."""
        self.bytes_allocated += num_bytes
        self.bytes_held += num_bytes
        self.bytes_peak = max(self.bytes_peak, self.bytes_held)

    def released(self, num_bytes: int) -> None:
        """A store let go of that many bytes."""
        self.bytes_held -= num_bytes

    def copied(self, rows: int, num_bytes: int) -> None:
        """`rows` rows per sequence were moved, `num_bytes` bytes in all."""
        self.copies += 1
        self.rows_copied += rows
        self.bytes_copied += num_bytes
