"""`python -m bmc_core`: calibrate and plan, their files, their errors, and what is missing."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from bmc_core.cli.app import app
from bmc_core.costs import calibration, pieces
from bmc_core.costs.measure import AttentionCost, Measured

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
MIB = 1 << 20
CONFIG = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def known_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of its own, and figures instead of a measurement."""
    figures = Measured(
        ((1 * MIB, 1e-4), (8 * MIB, 1e-3)),
        ((1 * MIB, 2e-4), (8 * MIB, 2e-3)),
        (AttentionCost(1e-5, 1e-10, 0.0), AttentionCost(1e-5, 1e-10, 0.0)),
        (AttentionCost(1e-5, 1e-10, 1e-10), AttentionCost(1e-5, 1e-10, 1e-10)),
        (AttentionCost(1e-5, 5e-11, 1e-13), AttentionCost(1e-5, 5e-11, 1e-13)),
        ((1, 1e-3), (16, 1.5e-3)),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "measure", lambda geometry, **settings: figures)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def invoke(*arguments: object) -> tuple[int, str]:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[│╭╮╰╯─\s]+", " ", result.output)


def test_plan_prints_the_spectrum_and_writes_files(model: Path, tmp_path: Path) -> None:
    figures, picture = tmp_path / "new" / "plan.json", tmp_path / "new" / "plan.png"
    code, text = invoke(
        *("plan", "--model", model, "--prompt", 64, "--new", 512, "--batch", 4),
        *("--attention", "padded", "--json", figures, "--plot", picture, "--threads", 1),
    )
    assert code == 0
    document = json.loads(figures.read_text())
    rows = [choice["r"] for choice in document["spectrum"]]
    assert rows == sorted(rows)
    assert rows[0] == 1
    assert rows[-1] == 64 + 512
    assert f"r = {document['r']}, T = {document['T']}" in text
    (chosen,) = [choice for choice in document["spectrum"] if choice["chosen"]]
    assert chosen["r"] == document["r"]
    costs = [c["copy_seconds"] + c["padding_seconds"] for c in document["spectrum"]]
    assert min(costs) == pytest.approx(chosen["copy_seconds"] + chosen["padding_seconds"])
    assert document["spectrum"][0]["growths"] == 512
    assert document["spectrum"][-1]["growths"] == 0
    assert document["T_star"] == pytest.approx(document["T"], abs=2)
    assert chosen["reserve_bytes"] == pytest.approx(chosen["mean_spare_rows"] * 2 * 512 * 4)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for word in ("up front", "reserve MiB", "2 layers, 4 query heads, 2 KV heads of 64, bfloat16"):
        assert word in text


def test_plan_of_the_native_kernel_and_of_drafts(model: Path) -> None:
    code, text = invoke(
        "plan", "--model", model, "--draft-tokens", 4, "--acceptance", 0.7, "--threads", 1
    )
    assert code == 0
    assert "attention native" in text
    assert "skips spare rows" in text
    assert re.search(r"at acceptance 0.7, [1-9]\d* draft tokens", text)


def test_calibrate_shows_and_keeps(model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = ("calibrate", "--model", model, "--threads", 1, "--json", figures)
    code, text = invoke(*arguments)
    assert code == 0
    assert "measured now" in text
    assert "c_row" in text
    assert json.loads(figures.read_text())["fresh"] is True
    assert Path(json.loads(figures.read_text())["file"]).exists()
    code, text = invoke(*arguments)
    assert "kept, " in text
    assert json.loads(figures.read_text())["fresh"] is False
    assert "measured now" in invoke(*arguments, "--refresh")[1]
    code, text = invoke(
        *("calibrate", "--layers", 2, "--heads", 4, "--kv-heads", 2, "--head-size", 64),
        *("--dtype", "float32", "--threads", 1),
    )
    assert code == 0
    assert "2 layers, 4 query heads, 2 KV heads of 64, float32" in text


def test_calibrate_times_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pieces, "_most_bytes", lambda: 1 << 20)
    monkeypatch.setattr(pieces, "MIN_ROUNDS", 1)
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(pieces, "time", clock)
    figures = tmp_path / "figures.json"
    shape = ("--layers", 2, "--heads", 4, "--kv-heads", 2, "--head-size", 64, "--threads", 1)
    code, text = invoke("calibrate", *shape, "--pieces", "--json", figures)
    assert code == 0
    assert "the smallest that takes at most 3% longer: 32 rows" in text, "every clock tick is one"
    assert set(json.loads(figures.read_text())["pieces"]) == {"0", *map(str, pieces.PIECES)}
    code, text = invoke("calibrate", *shape[:-4], "--head-size", 40, "--threads", 1, "--pieces")
    assert code == 2
    assert "--pieces is given, but the kernel takes no such cache" in text


def test_help_explains() -> None:
    for command, options in {
        "plan": ("model", "prompt", "new", "batch", "attention", "draft-tokens", "plot", "json"),
        "calibrate": ("model", "layers", "heads", "dtype", "threads", "refresh", "pieces", "json"),
    }.items():
        code, text = invoke(command, "--help")
        assert code == 0
        for option in options:
            assert f"--{option}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], ["--model is missing", "config.json"]),
        (["plan", "--model", "/nowhere"], ["--model is /nowhere", "without a config.json"]),
        (["plan", "--model", "MODEL", "--new", "0"], ["--new is 0", "an int >= 1"]),
        (["plan", "--model", "MODEL", "--attention", "x"], ["--attention", "'native'", "'sdpa'"]),
        (["plan", "--model", "MODEL", "--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["plan", "--model", "MODEL", "--threads", "9999"], ["--threads is 9999", "allowed: 1 to"]),
        (["plan", "--model", "MODEL", "--acceptance", "2"], ["--acceptance is 2.0", "0 to 1"]),
        (["plan", "--model", "MODEL", "--json", "/"], ["--json is /", "name of a file"]),
        (["plan", "--model", "MODEL", "--plot", "/dev/null/x"], ["--plot is", "not writable"]),
        (["plan", "--model", "MODEL", "--batch", "-1"], ["--batch is -1", "an int >= 1"]),
        (["calibrate", "--layers", "0", "--heads", "4"], ["--layers is 0", "an int >= 1"]),
        (["calibrate"], ["--model and --layers: expected one"]),
        (["calibrate", "--model", "MODEL", "--layers", "2"], ["expected one of them"]),
        (["calibrate", "--layers", "2"], ["--heads is missing"]),
        (["calibrate", "--layers", "2", "--heads", "4", "--kv-heads", "3"], ["multiple of"]),
    ],
)
def test_errors_name_the_option_and_what_is_allowed(
    model: Path, arguments: list[str], words: list[str]
) -> None:
    code, text = invoke(*(str(model) if word == "MODEL" else word for word in arguments))
    assert code == 2
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not readable"), ("[]", "missing"), ('{"n_layer": 2}', "attention heads is missing")],
)
def test_a_bad_config_is_named(model: Path, text: str, words: str) -> None:
    (model / "config.json").write_text(text)
    code, output = invoke("plan", "--model", model)
    assert code == 2
    assert words in output


def test_native_is_refused_where_it_cannot_be_used(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, "head_dim": 24}))
    code, text = invoke("plan", "--model", model, "--attention", "native")
    assert code == 2
    assert "--attention is native, but the head size is 24" in text
    assert "allowed: sdpa, padded" in text


def test_a_failed_measurement_ends_with_3(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(geometry, **settings) -> Measured:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(calibration, "measure", no_memory)
    code, text = invoke("plan", "--model", model, "--threads", torch.get_num_threads())
    assert code == 3
    assert "can't allocate memory" in text


def run_without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m bmc_core` in a process in which a package cannot be imported."""
    code = (
        f"import sys, runpy; sys.modules[{package!r}] = None; "
        f"sys.argv = ['bmc_core', *{arguments!r}]; "
        "runpy.run_module('bmc_core', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_names_the_extra(package: str) -> None:
    run = run_without(package, "plan", "--help")
    assert run.returncode == 3
    assert f"needs the package {package}" in run.stderr
    assert 'pip install "bmc-llm[cli]"' in run.stderr
    assert "Traceback" not in run.stderr


def test_missing_matplotlib_names_the_extra(model: Path, tmp_path: Path) -> None:
    run = run_without(
        "matplotlib", "plan", "--model", str(model), "--plot", str(tmp_path / "a.png")
    )
    assert run.returncode == 2
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", run.stderr + run.stdout)
    assert "--plot needs matplotlib" in text
    assert "bmc-llm[cli]" in text


@pytest.mark.parametrize("option", ["--prompt", "--new"])
def test_plans_have_an_end(model: Path, option: str) -> None:
    code, output = invoke("plan", "--model", model, option, 10**8)
    assert code == 2
    assert f"{option} is 100000000; allowed: at most 1000000 rows" in output
    assert invoke("plan", "--model", model, option, 10**6)[0] == 0


@pytest.mark.parametrize("command", ["info", "plan"])
@pytest.mark.parametrize("path", ["/proc/nowhere/figures.json", "/dev/full"])
def test_a_result_that_cannot_be_written_is_the_options_error(
    command: str, path: str, model: Path
) -> None:
    arguments = [] if command == "info" else ["--model", model]
    code, output = invoke(command, *arguments, "--json", path)
    assert code == 2
    assert f"--json is {path}, not writable" in output


def test_a_read_only_file_is_refused_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures.json"
    file.write_text("{}")
    plain = Path.open

    def guarded(path: Path, *arguments, **settings):  # root may write any file
        if path == file:
            raise PermissionError(13, "Permission denied")
        return plain(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", guarded)
    code, output = invoke("plan", "--model", model, "--json", file)
    assert code == 2
    assert "not writable (Permission denied); allowed: a file that can be written" in output
    assert "chosen" not in output


def test_standard_output_is_no_file(model: Path) -> None:
    code, output = invoke("plan", "--model", model, "--json", "-")
    assert code == 2
    assert "--json is -, not a file's name" in output
