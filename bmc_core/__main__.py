"""`python -m bmc_core`: the command line, or which extra it needs."""

from __future__ import annotations

import sys

EXTRA = 'pip install "bmc-llm[cli]"'


def main() -> int:
    """Runs the command line; returns 3, with a message, where typer or rich is missing."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"python -m bmc_core needs the package {error.name}: install the extra, {EXTRA}",
            file=sys.stderr,
        )
        return 3
    from bmc_core.command_line import app

    app()
    return 0


if __name__ == "__main__":
    sys.exit(main())
