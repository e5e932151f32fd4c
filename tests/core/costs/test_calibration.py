"""Calibration: real measurements of a tiny geometry, and what follows from known figures."""

import itertools
import logging
import math
import subprocess
import sys

import pytest
import torch

from bmc_core.costs import cache, calibration, measure
from bmc_core.costs.calibration import auto_policy, between, calibrate, key_of
from bmc_core.costs.geometry import Geometry
from bmc_core.costs.measure import AttentionCost, Measured, attention_costs, growth_points
from bmc_core.costs.model import Workload, best_rows
from bmc_core.policy import BMCPolicy
from tests.support.figures import FIGURES, MIB, ODD, TINY


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(calibration, "_known", {})


@pytest.mark.skipif(sys.platform != "linux", reason="neighbors are read from /proc/stat")
def test_a_busy_machine_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure, "MAX_BYTES", 4 * MIB)
    burn = "import time; end = time.time() + 20\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", burn]) as neighbor:
        with caplog.at_level(logging.WARNING, "bmc_core"):
            calibrate(TINY, threads=1, seconds=0.6)
        neighbor.terminate()
    assert "other processes took" in caplog.text
    assert "calibrate --refresh" in caplog.text


def test_a_real_measurement_of_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_BYTES", 4 * MIB)
    told: list[float] = []
    found = calibrate(TINY, threads=1, seconds=0.05, progress=lambda text, done: told.append(done))
    assert found.fresh
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert found.path is not None
    assert found.path.exists()
    figures = found.measured
    for curve in (figures.growth_rows, figures.growth_packed, figures.steps):
        assert curve is not None
        assert all(a[0] < b[0] for a, b in itertools.pairwise(curve))
        assert all(0 < seconds < 1 for _, seconds in curve)
    for costs in (figures.sdpa, figures.padded, figures.native):
        assert costs is not None
        for cost in costs:
            assert 0 < cost.valid < 1e-6
            assert cost.padding >= 0
    assert cache.load(key_of(TINY, 1))[0] == figures
    for name in calibration.ATTENTIONS:
        assert best_rows(Workload(16, 100), found.costs(name, 2)) >= 1


def test_growth_is_measured_at_rising_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_BYTES", 8 * MIB)
    with torch.inference_mode():
        for layout in ("rows", "packed"):
            points = growth_points(TINY, layout, 0.05)
            assert [round(size / MIB) for size, _ in points] == [0, 2, 8]
            assert all(seconds > 0 for _, seconds in points)


@pytest.mark.parametrize("path", ["native", "sdpa", "padded"])
def test_attention_costs_follow_from_three_times(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Seconds = call + valid bytes x valid + spare bytes x padding, solved for the three."""
    true = AttentionCost(1e-4, 3e-10, 2e-10)
    monkeypatch.setattr(measure, "MAX_BYTES", 4 * MIB)

    def known(calls, budget: float, rounds: int) -> list[float]:
        for call in calls:
            call()
        per_row = 8 * TINY.layer_row_bytes  # eight sequences: rows of a tiny model are small
        few, many = (true.call + rows * per_row * true.valid for rows in (256, 2048))
        return [few, many, many + 2048 * per_row * true.padding]

    monkeypatch.setattr(measure, "timed", known)
    with torch.inference_mode():
        assert attention_costs(TINY, path, 0.0, 96 * MIB) == pytest.approx(true)


def test_kept_figures_are_not_measured_again(
    measured: list[Geometry], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "bmc_core"):
        first = calibrate(TINY, threads=1)
    assert first.fresh
    assert [record.message for record in caplog.records] == [
        "bmc_core: measuring this machine, once, about 7 seconds: nothing was measured yet"
    ]
    assert not calibrate(TINY, threads=1).fresh
    forget(monkeypatch)
    again = calibrate(TINY, threads=1)
    assert not again.fresh
    assert again.measured == first.measured
    assert measured == [TINY]
    assert calibrate(TINY, threads=1, refresh=True).fresh
    assert len(measured) == 2


def test_figures_are_per_threads_dtype_geometry_and_versions(
    measured: list[Geometry], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Geometry(2, 2, 1, 32, torch.bfloat16, 64, 128)
    calibrate(TINY, threads=1)
    calibrate(TINY, threads=2)
    calibrate(half, threads=1)
    calibrate(Geometry(3, 2, 1, 32, torch.float32, 64, 128), threads=1)
    assert len(measured) == 4
    for change in (
        lambda: monkeypatch.setattr(torch, "__version__", "9.9"),
        lambda: monkeypatch.setattr(calibration, "_version", lambda: "9.9"),
        lambda: monkeypatch.setattr(calibration.native, "isa", lambda: "portable"),
        lambda: monkeypatch.setattr(calibration.cpu, "model_name", lambda: "another"),
        lambda: monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so"),
    ):
        before = len(measured)
        change()
        calibrate(TINY, threads=1)
        assert len(measured) == before + 1


def test_costs_scale_with_layers_and_batch(measured: list[Geometry]) -> None:
    found = calibrate(TINY, threads=1)
    one, four = found.costs("padded", 1), found.costs("padded", 4)
    row_bytes = TINY.layer_row_bytes
    assert one.c_row == pytest.approx(1e-10 * row_bytes * 2)
    assert four.c_read == pytest.approx(4 * one.c_read)
    assert one.growth_seconds(MIB / row_bytes) == pytest.approx(2 * 1e-4)
    assert four.growth_seconds(MIB / row_bytes / 4) == pytest.approx(2 * 1e-4)
    assert found.costs("sdpa", 1).c_row == found.costs("native", 1).c_row == 0.0
    assert one.step_seconds(1) == pytest.approx(1e-3 + 2 * 1e-5)
    with pytest.raises(ValueError, match="attention='flash': allowed are native, sdpa, padded"):
        found.costs("flash", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size=0"):
        found.costs("sdpa", 0)


def test_few_rows_are_priced_as_what_stays_in_caches() -> None:
    near, far = AttentionCost(0.0, 1e-11, 2e-11), AttentionCost(0.0, 3e-11, 4e-11)
    assert between((near, far), 0) == near
    assert between((near, far), measure.NEAR_BYTES) == near
    assert between((near, far), None) == far
    assert between((near, far), 10**12) == far
    middle = math.sqrt(measure.NEAR_BYTES * measure.MAX_BYTES)
    assert between((near, far), round(middle)) == pytest.approx((0.0, 2e-11, 3e-11))


def auto(**changes) -> BMCPolicy:
    arguments = {
        **{"batch_size": 2, "prompt_rows": 64, "total_rows": 1024, "attention": "sdpa"},
        **changes,
    }
    return auto_policy(TINY, **arguments)


def test_auto_policy_is_concrete(measured: list[Geometry]) -> None:
    policy = auto()
    assert policy == BMCPolicy(r=policy.r)
    assert not policy.is_auto
    assert auto(attention="native").r % 16 == 0
    assert auto(attention="padded").r < auto(attention="sdpa").r
    unknown = auto(total_rows=None)
    assert not unknown.is_auto
    assert not unknown.needs_limit
    assert unknown.rows_per_growth(100_000) > unknown.rows_per_growth(1000)
    assert auto(total_rows=10).rows_to_hold(0, 64, 64) == 64, "nothing new: the prompt and no more"
    assert len(measured) == 1


def test_auto_policy_refuses_and_survives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="attention='flash'"):
        auto(attention="flash")
    with pytest.raises(ValueError, match="prompt_rows=-1"):
        auto(prompt_rows=-1)

    tries: list[int] = []

    def no_memory(*arguments, **settings) -> Measured:
        tries.append(1)
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(calibration, "measure", no_memory)
    monkeypatch.setattr(calibration, "_failed", set())
    for _ in range(3):
        assert auto() == BMCPolicy.growing()
    assert len(tries) == 1, "later generations do not wait for another try"
    assert caplog.text.count("can't allocate memory") == 1
    with pytest.raises(ValueError, match="threads=0"):
        calibrate(TINY, threads=0)


def test_geometry_without_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_BYTES", 2 * MIB)
    found = calibrate(ODD, threads=1, seconds=0.02)
    assert found.measured.native is None
    assert found.measured.growth_packed is None
    with pytest.raises(ValueError, match='attention="native": .*allowed: "sdpa"'):
        found.costs("native", 1)
    arguments = {"batch_size": 1, "prompt_rows": 8, "total_rows": 64}
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert auto_policy(ODD, attention="native", **arguments) == auto_policy(
            ODD, attention="sdpa", **arguments
        )
    finally:
        torch.set_num_threads(torch_threads)


def test_threads_are_put_back(measured: list[Geometry], monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def note(geometry: Geometry, *, seconds: float, progress=None) -> Measured:
        seen.append(torch.get_num_threads())
        return FIGURES

    monkeypatch.setattr(calibration, "measure", note)
    calibrate(TINY, threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_importing_the_core_imports_no_framework_and_no_terminal() -> None:
    code = (
        "import sys, bmc_core.costs.calibration, bmc_core.costs.spectrum, bmc_core.__main__;"
        "print([m for m in ('transformers', 'vllm', 'typer', 'rich', 'matplotlib') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_progress_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, float]] = []

    def measure(geometry: Geometry, *, seconds: float, progress=None) -> Measured:
        progress("half", 0.5)
        return FIGURES

    monkeypatch.setattr(calibration, "measure", measure)
    calibrate(TINY, threads=1, progress=lambda text, done: heard.append((text, done)))
    assert heard == [("half", 0.5)]


def test_what_does_not_fit_is_refused_before_it_is_made() -> None:
    """Nothing below some thousand rows of a layer can be measured; this would take terabytes."""
    huge = Geometry(1, 100_000, 100_000, 4096, torch.bfloat16)
    with pytest.raises(RuntimeError, match="100000 KV heads of 4096 takes about .* GiB are free"):
        measure.measure(huge, seconds=0.1)
