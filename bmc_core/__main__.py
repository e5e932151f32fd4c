"""`python -m bmc_core`: the command line, or which extra it needs."""

from __future__ import annotations

import sys

from bmc_core.cli.extra import EXTRA


def main() -> int:
    """Runs the command line.

    Returns:
        3, with a message, where typer or rich is missing; `info` alone does without them.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        if sys.argv[1:] == ["info"]:
            from bmc_core.environment import as_text, report

            print(as_text(report()))
            return 0
        print(
            f"python -m bmc_core needs the package {error.name}: install the extra, {EXTRA} "
            "(info alone works without it)",
            file=sys.stderr,
        )
        return 3
    from bmc_core.cli.app import app

    app()
    return 0


if __name__ == "__main__":
    sys.exit(main())
