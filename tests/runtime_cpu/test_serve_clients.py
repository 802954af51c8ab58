"""The server under many clients at once, and under impatient ones: cancelling, slow, too many."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from tests.runtime_cpu.servers import (
    GOLDEN,
    HELLO,
    NAME,
    Server,
    chat_body,
    metric,
    never_stopping,
    open_stream,
    post,
    running_server,
    wait_for,
)


def test_concurrent_clients_get_their_own_answers(client: openai.OpenAI) -> None:
    def ask(number: int) -> str | None:
        messages: list[Any] = [{"role": "user", "content": f"number {number} " * (number + 1)}]
        answer = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=48)
        return answer.choices[0].message.content

    alone = [ask(number) for number in range(5)]
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        assert list(pool.map(ask, range(5))) == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(server: Server, stream: bool) -> None:
    before = metric(server, 'generations_total{finish="cancelled"}') if _has_cancelled(server) else 0.0
    for _ in range(5):  # the tiny model may finish before we are gone: try again
        if stream:  # several, so that each is slower
            for connection in [open_stream(server, **never_stopping()) for _ in range(4)]:
                connection.close()
        else:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(
                    f"{server.url}/v1/chat/completions",
                    json=chat_body(**never_stopping()),
                    timeout=httpx.Timeout(5, read=0.01),
                )
        wait_for(lambda: metric(server, "running") == 0)
        if _has_cancelled(server) and metric(server, 'generations_total{finish="cancelled"}') > before:
            break
    else:
        pytest.fail("no generation was cancelled")
    assert post(server, chat_body()).status_code == 200


def _has_cancelled(server: Server) -> bool:
    return 'finish="cancelled"' in httpx.get(f"{server.url}/metrics").text


def test_a_full_queue_refuses_at_once(server: Server) -> None:
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: post(server, chat_body(**never_stopping())), range(24)))
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 429}, codes
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "queue_full" and refused.headers["retry-after"]
    wait_for(lambda: metric(server, "running") + metric(server, "waiting") == 0)
    assert post(server, chat_body()).status_code == 200


def test_a_cancel_storm_leaves_others_alone(server: Server, client: openai.OpenAI) -> None:
    def ask() -> str | None:
        for _ in range(200):
            try:
                answer = client.chat.completions.create(
                    model=NAME, messages=HELLO, temperature=0, max_tokens=40
                )
                return answer.choices[0].message.content
            except openai.RateLimitError:
                time.sleep(0.02)
        raise AssertionError("the queue stayed full")

    expected = ask()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for _ in range(12):
            with contextlib.suppress(AssertionError):  # refused: the queue was full
                open_stream(server, **never_stopping()).close()
        assert [future.result() for future in asking] == [expected] * 4
    # Every place of those who left is free again, however late the server heard of it.
    wait_for(lambda: metric(server, "running") + metric(server, "waiting") == 0)


def test_a_slow_reader_does_not_hold_the_engine(server: Server) -> None:
    connection = open_stream(server, **never_stopping())
    try:
        wait_for(lambda: metric(server, "running") == 0)
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
        wait_for(lambda: metric(server, "running") + metric(server, "waiting") == 0)
