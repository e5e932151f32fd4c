"""What `make serve` runs after the set-up: the demo model, defaults, compiled mode, SIGTERM."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.support.serving import Server, environment, free_port

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, str(ROOT / "tools" / "serve.py")]


def chat_once(arguments: list[str], demo_cache: Path, log: Path) -> str:
    """What a served demo model says, and an orderly end; returns the server's metrics."""
    port = free_port()
    env = environment(XDG_CACHE_HOME=str(demo_cache))
    server = Server([*SERVE, "--port", str(port), *arguments], port, log, env)
    try:
        server.wait_until_ready()
        with openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        ) as client:
            answer = client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "Write f."}], max_tokens=16
            )
        assert answer.choices[0].message.content
        metrics = server.http.get("/metrics").text
        server.end_with(signal.SIGTERM)
    finally:
        server.stop()
    return metrics


def test_demo_model_with_default_settings(demo_cache: Path, tmp_path: Path) -> None:
    metrics = chat_once([], demo_cache, tmp_path / "server.log")
    assert "vllm:spec_decode_num_draft_tokens" not in metrics


@pytest.mark.parametrize("speculate", ["ngram", "draft"])
def test_demo_model_speculates(speculate: str, demo_cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    metrics = chat_once(["--speculate", speculate], demo_cache, log)
    assert "vllm:spec_decode_num_draft_tokens_total" in metrics
    method = {"ngram": "ngram", "draft": "draft_model"}[speculate]
    assert f'"method": "{method}"' in log.read_text()


def refused(*arguments: str) -> str:
    """What serve.py prints when it refuses to start (before it has loaded anything)."""
    result = subprocess.run(
        [*SERVE, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode != 0
    return result.stderr


def test_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in refused("--port", str(port))


def test_bad_port_names_the_setting() -> None:
    assert "PORT='eighty' is not a port" in refused("--port", "eighty")


def test_missing_model_directory_names_the_setting(tmp_path: Path) -> None:
    message = refused("--port", str(free_port()), "--model", str(tmp_path))
    assert f"MODEL={tmp_path} is not a Hugging Face model directory" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculate", "medusa"], "SPECULATE='medusa' is not known; allowed: ngram, draft"),
        (["--speculate", "draft", "--model", "x/y"], "SPECULATE=draft with MODEL=x/y; allowed"),
        (
            ["--speculate", "ngram", "--", "--speculative-config={}"],
            "SPECULATE=ngram and --speculative-config in ARGS; allowed: one of them",
        ),
    ],
)
def test_speculation_that_is_not_possible_names_the_setting(
    arguments: list[str], message: str
) -> None:
    assert message in refused(*arguments)
