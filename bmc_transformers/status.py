"""What `python -m bmc_core info` says of transformers."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from bmc_core.environment import Framework, version

TESTED_TRANSFORMERS = ">=5.19,<5.24"
"""The extra's range: versions that the tests ran with. Outside it nothing steps aside by itself."""


def status() -> Framework:
    """The installed transformers, and whether the tests ran with it."""
    found = version("transformers")
    if found is None or SpecifierSet(TESTED_TRANSFORMERS).contains(Version(found).base_version):
        return Framework(found, TESTED_TRANSFORMERS)
    return Framework(f"{found} (not tested)", TESTED_TRANSFORMERS)
