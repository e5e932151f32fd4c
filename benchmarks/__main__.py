"""The command line: registers the commands; each imports what it runs when it is called."""

from __future__ import annotations

import sys
import traceback

import typer

from benchmarks.generate import command as generate
from benchmarks.growth import command as growth
from benchmarks.kernel import command as kernel
from benchmarks.lib.command import renamed
from benchmarks.overhead import command as overhead
from benchmarks.pool import command as pool
from benchmarks.sampling import command as sampling
from benchmarks.speculation import command as speculation
from benchmarks.step import command as step

app = typer.Typer(
    help="BMC beside its peers on this machine. Every number is measured, and every answer "
    "checked, in the run that prints it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("kernel")(kernel.command)
app.command("step")(step.command)
app.command("generate")(generate.command)
app.command("speculation")(speculation.command)
app.command("growth")(growth.command)
app.command("pool")(pool.command)
app.command("overhead")(overhead.command)
app.command("sampling")(sampling.command)
app.command("model", hidden=True)(renamed(growth.command, "model", "growth"))


def main() -> None:
    """Ends with 4 after an exception that no command expects: Python's own 1 would say that an
    answer was wrong."""
    try:
        app(prog_name="python -m benchmarks")
    except Exception:
        traceback.print_exc()
        sys.exit(4)


if __name__ == "__main__":
    main()
