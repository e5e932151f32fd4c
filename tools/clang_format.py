"""Run clang-format over the native sources: rewrite them, or with --check only complain."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".c", ".cc", ".cpp", ".h", ".hpp"}


def main() -> int:
    roots = (ROOT / "bmc_core", ROOT / "tests")
    files = sorted(
        str(path) for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES
    )
    if not files:
        return 0
    mode = ["--dry-run", "-Werror"] if "--check" in sys.argv[1:] else ["-i"]
    return subprocess.run(["clang-format", *mode, *files], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
