"""`policy="auto"`: what this machine was measured to do decides."""

from __future__ import annotations

import pytest
import torch

from bmc_core.costs import calibration
from bmc_core.costs.geometry import Geometry
from bmc_core.policy import BMCPolicy
from bmc_transformers import enable
from bmc_transformers.auto_policy import policy_for
from tests.support.architectures import build, generated, prompt


@pytest.mark.parametrize("attention", ["bmc", "stock"])
def test_auto_is_what_calibration_says(attention, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = build("llama")
    geometry = Geometry.from_config(model.config, torch.float32)
    calibration.calibrate(geometry, seconds=0.2)
    enable(model, "auto", attention=attention)
    output = generated(model, {"inputs": prompt(), "num_beams": 2})
    wanted = calibration.auto_policy(
        geometry,
        batch_size=4,
        prompt_rows=21,
        total_rows=60,
        attention="native" if attention == "bmc" else "sdpa",
    )
    assert output.past_key_values.policy == wanted
    assert not wanted.is_auto


def test_auto_without_a_known_geometry_grows(caplog) -> None:
    policy = BMCPolicy("auto")
    model = build("llama")
    model.config.num_hidden_layers = 0
    arguments = {"batch_size": 1, "prompt_rows": 0, "total_rows": None, "native": True}
    assert policy_for(model, policy, **arguments) is policy
    assert 'policy "auto" grows without calibration' in caplog.text
