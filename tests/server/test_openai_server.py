"""A real server on loopback, driven by the real openai client, with BMC attention.

The tests share one server and run in file order; the last one ends it.
"""

import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.support.serving import Server, environment, free_port

MODEL = "demo"
MAX_MODEL_LEN = 1024
R = 128  # rows of a chunk; long prompts below cross several of these boundaries


@pytest.fixture(scope="module")
def server(demo_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(demo_target),
        "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port),
        "--attention-backend", "BMC", "--additional-config", json.dumps({"bmc": {"r": R}}),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN),
        "--max-num-seqs", "64",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "server.log"
    running = Server(command, port, log, environment())
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=120,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as made:
        yield made


def async_client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=180,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )


def wait_until_free(server: Server, client: openai.OpenAI, seconds: float = 30) -> None:
    """Every request has ended and every block is free, in vLLM's accounts and in ours.

    vLLM refreshes its gauges when the engine steps, and an idle engine does not: a one-token
    request makes it.
    """
    names = (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "bmc:kv_rows_reserved",
        "bmc:kv_rows_spare",
    )
    deadline = time.monotonic() + seconds
    while True:
        client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        values = {name: server.metric(name) for name in names}
        if not any(values.values()):
            return
        assert time.monotonic() < deadline, f"not free after {seconds} s: {values}"
        time.sleep(0.5)


def test_health_and_models(server: Server, client: openai.OpenAI) -> None:
    assert server.http.get("/health").status_code == 200
    assert [model.id for model in client.models.list()] == [MODEL]


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="import os\n\ndef ",
        max_tokens=24,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Write a function add: Return a plus b."}],
        max_tokens=24,
        temperature=0,
    )
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content
    assert "<|" not in message.content
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 24


def test_streaming_gives_the_same_text(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "prompt": "class Reader:\n", "max_tokens": 48, "temperature": 0}
    whole = client.completions.create(**request).choices[0].text
    parts = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert len(parts) > 1
    assert "".join(parts) == whole


def test_concurrent_answers_equal_those_given_alone(server: Server, client: openai.OpenAI) -> None:
    """32 requests of mixed lengths in one batch: the same greedy tokens as one at a time."""
    draw = random.Random(0)
    requests = [
        {
            "model": MODEL,
            # Token ids: lengths on both sides of the chunk boundaries, nothing left to the
            # tokenizer. Different first tokens, so that only some of it is in the prefix cache.
            "prompt": [draw.randrange(300, 5000) for _ in range(rows)],
            "max_tokens": draw.choice((1, 3, 8, 16, 24)),
            "temperature": 0,
            "extra_body": {"ignore_eos": True, "return_token_ids": True},
        }
        for rows in [1, 2, R - 1, R, R + 1, 2 * R, 3 * R + 5, 900]
        + [draw.randrange(1, 300) for _ in range(24)]
    ]

    async def together() -> list[list[int]]:
        async with async_client(server) as several:
            answers = await asyncio.gather(*(several.completions.create(**r) for r in requests))
        return [answer.choices[0].token_ids for answer in answers]

    concurrent = asyncio.run(together())
    alone = [client.completions.create(**r).choices[0].token_ids for r in requests]
    assert [len(tokens) for tokens in alone] == [r["max_tokens"] for r in requests]
    wrong = [i for i in range(len(requests)) if concurrent[i] != alone[i]]
    assert not wrong, f"requests {wrong} answered otherwise in a batch"
    wait_until_free(server, client)


def test_aborts_in_mid_stream_free_everything(server: Server, client: openai.OpenAI) -> None:
    reserved: list[float] = []

    async def read_some(several: openai.AsyncOpenAI, number: int) -> None:
        stream = await several.completions.create(
            model=MODEL,
            prompt=f"def f{number}(x):\n" * (1 + number * 4),
            max_tokens=700,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        seen = 0
        async for _ in stream:
            seen += 1
            if seen >= 1 + number:
                break
        for _ in range(20):  # the gauge is written twice a second
            reserved.append(server.metric("bmc:kv_rows_reserved"))
            if reserved[-1] >= R:
                break
            await asyncio.sleep(0.1)
        await stream.close()

    async def all_of_them() -> None:
        async with async_client(server) as several:
            await asyncio.gather(*(read_some(several, number) for number in range(8)))

    asyncio.run(all_of_them())
    assert max(reserved) >= R  # the gauge was seen to move: its zero below means something
    wait_until_free(server, client)


def test_prompt_longer_than_the_model_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model=MODEL, prompt=[500] * (MAX_MODEL_LEN + 1), max_tokens=1)
    assert refusal.value.status_code == 400
    assert str(MAX_MODEL_LEN) in str(refusal.value)


def test_request_up_to_the_last_row(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=[500] * (MAX_MODEL_LEN - 8),
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == MAX_MODEL_LEN


def test_invalid_json_is_refused(server: Server) -> None:
    answer = server.http.post(
        "/v1/completions",
        content='{"model": "demo", "prompt": ',
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400


def test_unknown_model_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x", max_tokens=1)


def test_all_is_well_afterwards(server: Server, client: openai.OpenAI) -> None:
    """After bad requests, aborts and a full batch: healthy, empty, and the growths counted."""
    wait_until_free(server, client)
    assert server.http.get("/health").status_code == 200
    assert server.metric("bmc:kv_growths_total") > 0


def test_ends_on_ctrl_c(server: Server) -> None:
    """Last in this file: the shared server is gone afterwards."""
    server.end_with(signal.SIGINT, whole_group=True)
