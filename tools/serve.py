"""Start `vllm serve` with BMC attention and settings that suit this machine.

Called by `make serve` inside the environment that the set-up made. Every setting it chooses is
printed, and one that the user has set already is left alone.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file is run as a script

from bmc_core.machine.cpu import allowed_cpus, physical_cores  # noqa: E402
from bmc_core.machine.memory import available_bytes  # noqa: E402
from tools.demo import model as demo_model  # noqa: E402

# vLLM's "auto" binding leaves one core to the API server and the scheduler. On few cores that
# is a large share of the machine, and the scheduler sleeps while the worker computes.
MAX_CORES_TO_BIND_ALL = 4
SEVERAL_WORKERS = (
    "--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size",
    "-dp",
)  # fmt: skip
GIB = 1 << 30
SPECULATE = ("ngram", "draft")
# Most draft tokens of a step: BMC chooses for each request how many are worth verifying, and
# those of n-gram cost nothing to make.
MAX_DRAFT_TOKENS = {"ngram": 16, "draft": 8}


def say(text: str) -> None:
    print(f"serve: {text}", flush=True)


def choose_settings(environment: MutableMapping[str, str], arguments: Sequence[str] = ()) -> None:
    """Fill in vLLM's CPU settings that the user has not set, and print what is in force.

    `arguments`: of `vllm serve`. Several workers need a list of cores each, which vLLM makes.
    """
    chosen = {}
    if "VLLM_CPU_KVCACHE_SPACE" not in environment:
        # A quarter of what is free, for the model needs room too; 4 GiB is plenty to start with.
        gib = max(1, min(4, available_bytes() // 4 // GIB))
        chosen["VLLM_CPU_KVCACHE_SPACE"] = str(gib)
    if "VLLM_CPU_OMP_THREADS_BIND" not in environment:
        cores = physical_cores(allowed_cpus())
        few = len(cores) <= MAX_CORES_TO_BIND_ALL
        several = any(text.partition("=")[0] in SEVERAL_WORKERS for text in arguments)
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = (
            ",".join(map(str, cores)) if few and not several else "auto"
        )
    environment.update(chosen)
    notes = {
        "VLLM_CPU_KVCACHE_SPACE": "GiB for the KV cache",
        "VLLM_CPU_OMP_THREADS_BIND": "cores that compute",
    }
    for name, note in notes.items():
        origin = "chosen here; set it to override" if name in chosen else "from your environment"
        say(f"{name}={environment[name]}  ({note}; {origin})")


def check_port(host: str, port: int) -> None:
    """Say that a port is taken now, rather than after the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SystemExit(
            f"serve: error: cannot listen on {host} port {port} ({error.strerror}). "
            f"Choose another port: make serve PORT={port + 1 if port < 65535 else 8000}"
        ) from None


def port_number(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"PORT={text!r} is not a port: 1 to 65535")
    return int(text)


def speculation_name(text: str) -> str:
    if text not in ("", *SPECULATE):
        raise argparse.ArgumentTypeError(
            f"SPECULATE={text!r} is not known; allowed: {', '.join(SPECULATE)}, or nothing"
        )
    return text


def demo_folder() -> Path:
    """The demo model and its draft, made now if they are not there."""
    try:
        return demo_model.ensure()
    except OSError as error:
        raise SystemExit(f"serve: error: no demo model: {error}") from None


def check_speculation(speculate: str, model: str, arguments: Sequence[str]) -> None:
    """Say what cannot be speculated with before anything is made or loaded."""
    if not speculate:
        return
    if any(text.startswith(("--speculative-config", "-sc")) for text in arguments):
        raise SystemExit(
            f"serve: error: SPECULATE={speculate} and --speculative-config in ARGS; "
            "allowed: one of them"
        )
    if speculate == "draft" and model:
        raise SystemExit(
            f"serve: error: SPECULATE=draft with MODEL={model}; allowed: the demo model, which "
            'has a draft of its own. For another: ARGS="--speculative-config.model=DRAFT '
            '--speculative-config.num_speculative_tokens=8"'
        )


def speculation_arguments(speculate: str) -> list[str]:
    """Options of `vllm serve` for draft tokens; the number in them is the most per step."""
    if not speculate:
        return []
    config: dict[str, Any] = {"num_speculative_tokens": MAX_DRAFT_TOKENS[speculate]}
    if speculate == "draft":
        config = {"method": "draft_model", "model": str(demo_folder() / "draft"), **config}
    else:
        config = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 5, **config}
    return ["--speculative-config", json.dumps(config)]


def model_arguments(model: str) -> list[str]:
    """The model to serve; without one the demo model, under the short name "demo"."""
    if not model:
        path = demo_folder() / "target"
        say(f"MODEL is not given: serving the demo model as 'demo' ({path})")
        return [str(path), "--served-model-name", "demo"]
    looks_like_path = model.startswith((".", "/", "~"))
    path = Path(model).expanduser()
    if looks_like_path and not (path / "config.json").is_file():
        raise SystemExit(
            f"serve: error: MODEL={model} is not a Hugging Face model directory "
            f"(there is no {path / 'config.json'})"
        )
    return [str(path) if looks_like_path else model]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="directory or name (default: demo model)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port_number, default=8000)
    parser.add_argument(
        "--speculate", type=speculation_name, default="",
        help=f"speculative decoding: {', '.join(SPECULATE)} (default: none)",
    )  # fmt: skip
    parser.add_argument("arguments", nargs="*", help="passed to `vllm serve`, after --")
    arguments = parser.parse_args()

    check_speculation(arguments.speculate, arguments.model, arguments.arguments)
    check_port(arguments.host, arguments.port)
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", *model_arguments(arguments.model),
        "--host", arguments.host, "--port", str(arguments.port),
        "--attention-backend", "BMC", *speculation_arguments(arguments.speculate),
        *arguments.arguments,
    ]  # fmt: skip
    if shutil.which(command[0]) is None:
        raise SystemExit(f"serve: error: no vllm beside {sys.executable}; run make setup")
    choose_settings(os.environ, arguments.arguments)
    say(f"$ {shlex.join(command)}")
    say(f"ready in about a minute at http://{arguments.host}:{arguments.port}/v1; Ctrl-C stops it")
    # The server takes this process's place, so that Ctrl-C and signals reach it directly.
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
