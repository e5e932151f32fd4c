"""The native module: whether it works on this machine, and which instruction set it uses.

Promises that importing this file never fails: a missing or broken native module is a reason, told
by `load_error()`, not an exception. Knows nothing of tensors.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from bmc_core._native import Module

ISA_VARIABLE = "BMC_ISA"


@functools.cache
def _load() -> tuple[Module | None, str | None]:
    # torch first: its libgomp must be the process's only OpenMP runtime, and ours resolves to it.
    import torch  # noqa: F401

    try:
        from bmc_core import _native

        loaded = cast("Module", _native)
    except ImportError as error:
        return None, f"bmc_core's native module does not load: {error}"
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted:
        try:
            loaded.select_isa(wanted)
        except ValueError as error:
            return None, f"{ISA_VARIABLE}={wanted}: {error}"
    return loaded, None


def load_error() -> str | None:
    """Why the native kernels cannot be used here (a sentence for a log line), or None."""
    return _load()[1]


def module() -> Module:
    """The native module.

    Raises:
        RuntimeError: it does not load here; the message says why.
    """
    native, error = _load()
    if native is None:
        raise RuntimeError(error)
    return native


def isa() -> str:
    """The instruction set in use: the best usable one, or the one that `BMC_ISA` forces."""
    return module().isa()


def usable_isas() -> list[str]:
    """Instruction sets that this machine can run, best first."""
    return module().usable_isas()


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Uses another instruction set inside a `with` block (whole process; for tests and benchmarks).

    Raises:
        ValueError: `name` is not usable on this machine; the message lists what is.
    """
    native = module()
    before = native.isa()
    native.select_isa(name)
    try:
        yield
    finally:
        native.select_isa(before)


def num_threads() -> int:
    """OpenMP threads that a call from this thread uses (torch's own pool)."""
    return module().num_threads()
