"""Ceilings in milliseconds: these tests are about what a run does, not about the machine."""

from collections.abc import Iterator

import pytest

from benchmarks.lib import ceilings


@pytest.fixture(scope="module", autouse=True)
def _small_reads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "MIN_READ_BYTES", 1 << 20)
        patch.setattr(ceilings, "READS_OVER_L3", 0)
        yield
