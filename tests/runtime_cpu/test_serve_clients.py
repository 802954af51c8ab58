"""The server under many clients at once, and under impatient ones: cancelling, slow, too many."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.runtime_cpu.servers import (
    GOLDEN,
    HELLO,
    LONG_CONTEXT,
    MODEL,
    NAME,
    Server,
    ask_only,
    await_idle,
    await_metric,
    chat_body,
    get,
    metric,
    never_stopping,
    open_stream,
    post,
    running_server,
)
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def endless_server() -> Iterator[Server]:
    """Its long answers take minutes, however fast the machine is."""
    with running_server(MODEL, "--context", str(LONG_CONTEXT), "--queue", "4", endless=True) as running:
        yield running


LONG: dict[str, Any] = {"max_tokens": 16000}


def test_concurrent_clients_get_their_own_answers(client: openai.OpenAI) -> None:
    def ask(number: int) -> str | None:
        messages: list[Any] = [{"role": "user", "content": f"number {number} " * (number + 1)}]
        answer = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=48)
        return answer.choices[0].message.content

    alone = [ask(number) for number in range(5)]
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        assert list(pool.map(ask, range(5))) == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(endless_server: Server, stream: bool) -> None:
    before = cancelled(endless_server)
    if stream:
        connections = [open_stream(endless_server, **LONG)]
        connections += [ask_only(endless_server, stream=True, **LONG) for _ in range(3)]  # these wait
        await_metric(endless_server, "waiting", 3)
    else:
        connections = [ask_only(endless_server, **LONG)]
        await_metric(endless_server, "running", 1)
    for connection in connections:
        connection.close()
    wait_for(lambda: cancelled(endless_server) > before, "the end of the generation")
    await_idle(endless_server)
    assert post(endless_server, chat_body()).status_code == 200


def cancelled(server: Server) -> float:
    name = 'generations_total{finish="cancelled"}'
    return metric(server, name) if name in get(server, "/metrics").text else 0.0


def test_a_full_queue_refuses_at_once(endless_server: Server) -> None:
    first = open_stream(endless_server, **LONG)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(post, endless_server, chat_body()) for _ in range(4)]
        await_metric(endless_server, "waiting", 4)
        refused = post(endless_server, chat_body())
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full" and refused.headers["retry-after"]
        assert not any(answer.done() for answer in waiting)
        first.close()
        assert [answer.result().status_code for answer in waiting] == [200] * 4
    await_idle(endless_server)
    assert post(endless_server, chat_body()).status_code == 200


def test_a_cancel_storm_leaves_others_alone(server: Server, client: openai.OpenAI) -> None:
    def ask() -> str | None:
        def answered() -> list[str | None]:
            with contextlib.suppress(openai.RateLimitError):
                answer = client.chat.completions.create(
                    model=NAME, messages=HELLO, temperature=0, max_tokens=40
                )
                return [answer.choices[0].message.content]
            return []

        return wait_for(answered, "a place in the queue")[0]

    expected = ask()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for _ in range(12):
            with contextlib.suppress(AssertionError):  # refused: the queue was full
                open_stream(server, **never_stopping()).close()
        assert [future.result() for future in asking] == [expected] * 4
    # Every place of those who left is free again, however late the server heard of it.
    await_idle(server)


def test_a_slow_reader_does_not_hold_the_engine(server: Server) -> None:
    connection = open_stream(server, **never_stopping())
    try:
        await_metric(server, "running", 0)
        assert post(server, chat_body()).status_code == 200
    finally:
        connection.close()


def test_a_slow_body_does_not_hold_the_engine(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        )
        assert post(server, chat_body()).status_code == 200


def test_parallel_clients_share_their_steps() -> None:
    """Two at a time get what each would get alone, and both run."""
    with running_server(
        GOLDEN / "tiny-4b-q8_0.gguf", "--context", "512", "--parallel", "2", "--model-name", "m"
    ) as server:

        def ask(number: int) -> str:
            body = {"prompt": f"number {number} " * 3, "max_tokens": 60, "temperature": 0.7, "seed": number}
            answer = post(server, body, "/v1/completions")
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        alone = [ask(number) for number in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, number) for number in range(4)]
            most = 0.0
            while not all(future.done() for future in asked):
                most = max(most, metric(server, "running"))
            assert [future.result() for future in asked] == alone
        assert most <= 2
        await_idle(server)
