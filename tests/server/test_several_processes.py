"""Two API servers before two engines: `/metrics` has the figures of all, and nothing is left."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.serving import STOP_SECONDS, Server, environment, free_port

GIB = 1 << 30


def left_by_metrics(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix == ".db" or "bmc" in path.name]


def api_servers(server: Server, port: int) -> list[psutil.Process]:
    """The processes below the first one that listen."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [
        child
        for child in children
        if any(connection.laddr.port == port for connection in child.net_connections("inet"))
    ]


def wait_for_metric(server: Server, name: str, value: float) -> None:
    deadline = time.monotonic() + 30
    while (found := server.metric(name)) != value:
        assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
        time.sleep(0.5)


def test_metrics_of_all_ranks_until_an_api_server_is_killed(
    demo_target: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(demo_target),
        "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
        "--attention-backend", "BMC", "--additional-config", json.dumps({"bmc": {"r": 64}}),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
        "--api-server-count", "2", "--data-parallel-size", "2",
    ]  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    # vLLM's sockets lie here, whose names may have 107 bytes: pytest's folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="bmc-"))
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    env = environment(TMPDIR=str(folder), VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}")
    server = Server(command, port, tmp_path / "server.log", env)
    try:
        server.wait_until_ready()
        assert 1.9 * GIB < server.metric("bmc:kv_pool_bytes") <= 2 * GIB
        assert server.metric("bmc:kv_pool_resident_bytes") == server.metric("bmc:kv_pool_bytes")
        assert server.metric("bmc:kv_growths_total") == 0
        for engine in (0, 1):
            answer = server.http.post(
                "/v1/completions",
                json={"model": "demo", "prompt": [300] * 100, "max_tokens": 2},
                headers={"X-data-parallel-rank": str(engine)},
            )
            assert answer.status_code == 200
        wait_for_metric(server, "bmc:kv_growths_total", 2)
        text = server.http.get("/metrics").text
        for engine in (0, 1):
            assert f'bmc:kv_pool_bytes{{engine="{engine}",model_name="demo"}}' in text
        assert left_by_metrics(folder)
        victims = api_servers(server, port)
        assert len(victims) == 2
        victims[0].send_signal(signal.SIGKILL)
        server.process.wait(STOP_SECONDS)
        deadline = time.monotonic() + STOP_SECONDS
        while server.remaining() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not server.remaining()
        assert not left_by_metrics(folder)
        with pytest.raises(httpx.TransportError):
            server.http.get("/health")
    finally:
        server.stop()
