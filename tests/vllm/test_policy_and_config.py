"""The growth policy's answers and the settings' refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmc_core.policy import DEFAULT_R, BMCPolicy
from bmc_vllm.config import BMCConfig


@given(st.integers(1, 300), st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 3000))
def test_rows_to_hold(r: int, held: int, needed: int, room: int) -> None:
    rows = BMCPolicy(r).rows_to_hold(held, needed)
    assert rows >= max(held, needed)
    assert (rows - held) % r == 0
    assert rows == held or rows - r < needed
    assert BMCPolicy(r).rows_to_hold(held, needed, needed + room) in (
        held if needed <= held else min(rows, needed + room),
    )


def test_policy_refuses() -> None:
    with pytest.raises(ValueError, match=r"r=0.*positive"):
        BMCPolicy(0)
    with pytest.raises(TypeError, match=r"r=1\.5"):
        BMCPolicy(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit=5"):
        BMCPolicy(16).rows_to_hold(0, 6, 5)
    with pytest.raises(ValueError, match="held=-1"):
        BMCPolicy(16).rows_to_hold(-1, 6)


@pytest.mark.parametrize("settings", [None, {}, {"r": None}, {"r": "auto"}])
def test_default_r(settings: object) -> None:
    config = BMCConfig.from_dict(settings)
    assert config == BMCConfig()
    assert config.policy(32).r == DEFAULT_R
    assert config.policy(48).r == 144


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"\['r'\]=0: expected a positive multiple of the block size"),
        ({"r": -32}, "=-32: expected a positive"),
        ({"r": "many"}, "'many': expected .* or 'auto'"),
        ({"r": 64.0}, "64.0: expected"),
        ({"r": True}, "True: expected"),
        ({"rows": 64}, "unknown keys rows; allowed: r, release_free_memory"),
        ({"release_free_memory": 1}, "=1: expected true or false"),
        (64, "=64: expected a dict with the keys r"),
    ],
)
def test_config_refuses(settings: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BMCConfig.from_dict(settings)


def test_r_is_whole_blocks() -> None:
    BMCConfig(r=96).check_block_size(32)
    with pytest.raises(ValueError, match=r"'r'\]=100: .*block size \(32\), for example 96 or 128"):
        BMCConfig(r=100).check_block_size(32)
    with pytest.raises(ValueError, match="for example 32, or 'auto'"):
        BMCConfig(r=16).check_block_size(32)
