"""Attention over pieces: what is timed, and which piece is enough."""

import pytest
import torch

from bmc_core.costs.pieces import PIECES, SEQUENCES, _table, piece_seconds, smallest_fast


def test_every_piece_is_timed() -> None:
    seconds = piece_seconds(2, 32, torch.float32, num_heads=4, seconds=0.0, most=1 << 20)
    assert sorted(seconds) == [0, *PIECES]
    assert all(0 < value < 1e-3 for value in seconds.values())


def test_what_the_kernel_does_not_take_is_refused() -> None:
    with pytest.raises((ValueError, TypeError)):
        piece_seconds(2, 40, torch.float32, seconds=0.0, most=1 << 20)


@pytest.mark.parametrize("piece", [32, 256])
def test_tables_hold_every_block_once(piece: int) -> None:
    table = _table(SEQUENCES * 64, piece)
    assert table.shape == (SEQUENCES, 64)
    assert sorted(table.flatten().tolist()) == list(range(SEQUENCES * 64))
    size = piece // 16
    assert all((run.diff() == 1).all() for run in table.reshape(-1, size))
    assert (table.flatten().diff() == 1).float().mean() < 1 - 1 / (2 * size)


def test_the_smallest_that_is_nearly_as_fast() -> None:
    seconds = dict(zip((0, *PIECES), (1.0, 1.2, 1.1, 1.02, 1.01, 1.0, 0.99), strict=True))
    assert smallest_fast(seconds) == 256
    assert smallest_fast(seconds, 0.05) == 128
    assert smallest_fast(seconds, 1.0) == 32
    assert smallest_fast(seconds | {1024: 3.0, 512: 3.0, 256: 3.0, 128: 3.0}) == 1024
