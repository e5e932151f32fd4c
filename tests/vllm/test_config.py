"""What a user may set, and how a refusal reads."""

from types import SimpleNamespace

import pytest

from bmc_core.policy import DEFAULT_R
from bmc_vllm.config import BMCConfig


@pytest.mark.parametrize("settings", [None, {}])
def test_default_r(settings: object) -> None:
    config = BMCConfig.from_dict(settings)
    assert config == BMCConfig()
    config.check_block_size(48)
    assert config.rows(32) == DEFAULT_R
    assert config.rows(48) == 144


def test_auto_r_needs_no_whole_blocks() -> None:
    config = BMCConfig.from_dict({"r": "auto"})
    config.check_block_size(48)
    assert config.r == "auto"


def test_r_is_rounded_up_where_vllm_made_blocks_larger() -> None:
    """As it does for hybrid models, long after the settings were checked."""
    config = BMCConfig(r=256)
    config.check_block_size(128)
    assert config.rows(544) == 544


def test_draft_length() -> None:
    assert BMCConfig().draft_length == "auto"
    assert BMCConfig.from_dict({"draft_length": "fixed"}).draft_length == "fixed"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"\['r'\]=0: expected a positive multiple of the block size"),
        ({"r": -32}, "=-32: expected a positive"),
        ({"r": "Auto"}, r"'Auto': expected .*an int, in rows; default 128\) or 'auto'"),
        ({"r": None}, "None: expected"),
        ({"r": 64.0}, "64.0: expected"),
        ({"r": True}, "True: expected"),
        ({"rows": 64}, "unknown keys rows; allowed: r, release_free_memory, draft_length"),
        ({"release_free_memory": 1}, "=1: expected true or false"),
        ({"draft_length": 4}, r"\['draft_length'\]=4: expected 'auto' .*default.* or 'fixed'"),
        ({"draft_length": None}, "=None: expected 'auto'"),
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
    with pytest.raises(ValueError, match=r"'r'\]=128: .*block size \(48\), for example 96 or 144"):
        BMCConfig.from_dict({"r": 128}).check_block_size(48)
    with pytest.raises(ValueError, match="for example 32$"):
        BMCConfig(r=16).check_block_size(32)


@pytest.mark.parametrize("additional", [{}, {"other": 1}, {"bmc": {}}, {"bmc": None}])
def test_other_plugins_settings_are_left_alone(additional: dict) -> None:
    assert BMCConfig.from_vllm_config(SimpleNamespace(additional_config=additional)) == BMCConfig()


def test_additional_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="additional_config is a list: .* the key 'bmc' of a dict"):
        BMCConfig.from_vllm_config(SimpleNamespace(additional_config=[1]))
