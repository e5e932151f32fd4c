"""`from bmc_core import ...`: every public name is there, and costs nothing before it is used."""

import subprocess
import sys

import pytest

import bmc_core


@pytest.mark.parametrize("name", bmc_core.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(bmc_core, name).__doc__
    assert name in dir(bmc_core)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'bmc_core' has no attribute 'nothing'"):
        _ = bmc_core.nothing


def test_importing_imports_nothing_heavy() -> None:
    code = "import sys, bmc_core, bmc_core.machine.cpu, bmc_core.machine.memory, bmc_core.policy;"
    code += "print([m for m in ('torch', 'numpy', 'platformdirs', 'typer') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
