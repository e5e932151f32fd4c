"""`policy="auto"`: what this machine was measured to do decides."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bmc_core.costs import calibration
from bmc_core.costs.geometry import Geometry
from bmc_core.policy import BMCPolicy
from bmc_transformers import enable
from bmc_transformers.auto_policy import policy_for
from tests.support.alarms import within
from tests.support.architectures import build, generated, prompt


@pytest.mark.parametrize("attention", ["bmc", "stock"])
def test_auto_is_what_calibration_says(attention, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = build("llama")
    geometry = Geometry.from_config(model.config, torch.float32)
    calibration.calibrate(geometry, seconds=0.02)
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


def digits(path: Path) -> None:
    """An integer that no float can hold, where a number of seconds was."""
    document = json.loads(path.read_text())
    document["created"] = document["measured"]["steps"][0][1] = 10**400
    path.write_text(json.dumps(document))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [digits, fifo])
def test_a_damaged_calibration_file_stops_no_generate(
    damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_known", {})
    measure = calibration.measure
    monkeypatch.setattr(calibration, "measure", lambda g, *, seconds: measure(g, seconds=0.02))
    model = enable(build("llama"), "auto")
    tokens = generated(model, {"inputs": prompt()}, 4).sequences
    (path,) = tmp_path.rglob("*.json")
    damage(path)
    calibration._known.clear()  # as in a new process
    with within(120):
        again = generated(model, {"inputs": prompt()}, 4)
    assert torch.equal(again.sequences, tokens)
    assert not again.past_key_values.policy.is_auto
    assert path.is_file(), "measured again and kept"
