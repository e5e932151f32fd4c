"""Which OpenMP runtime runs our parallel regions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bmc_core.machine import openmp

RUNTIME = Path(sys.prefix, "lib", "libiomp5.so")
SCRIPT = (
    "from bmc_core import native; from bmc_core.machine import openmp\n"
    "native.module(); print(openmp.serving())"
)


def test_torchs_own_serves() -> None:
    import torch  # noqa: F401  (brings its runtime along)

    assert openmp.serving() in openmp.runtimes()


@pytest.mark.skipif(not RUNTIME.exists(), reason="intel-openmp is not installed")
def test_a_preloaded_runtime_serves() -> None:
    """Torch's is loaded as well, and does not run."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "LD_PRELOAD": str(RUNTIME)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == RUNTIME.name
