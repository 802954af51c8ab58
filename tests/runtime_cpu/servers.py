"""Starts real server processes for tests: ``with running_server(MODEL, "--context", "256") as server: server.url``."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.waiting import CEILING_S, wait_for

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "gguf"
MODEL = GOLDEN / "tiny-4b-q8_0.gguf"
NAME = MODEL.stem
CONTEXT = 2048
LONG_CONTEXT = 16384


@dataclass
class Server:
    """A running server and what it has said."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "runtime_cpu.serve", *map(str, arguments)]


@contextmanager
def running_server(model: Path, *arguments: str, endless: bool = False) -> Iterator[Server]:
    """A server with a thread; ``endless`` as of :mod:`tests.runtime_cpu.endless`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    starting = command(model, "--port", "0", "--threads", "1", *arguments)
    if endless:
        starting[2:2] = ["tests.runtime_cpu.endless"]
    process = subprocess.Popen(
        starting,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            if "OpenAI API" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(CEILING_S), f"the server did not start: {lines}"
        found = re.search(r"http://\S+:\d+", "\n".join(lines))
        assert found, f"the server did not start: {lines}"
        yield Server(process, found.group(), lines)
    finally:
        process.terminate()
        try:
            process.wait(timeout=CEILING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stderr.close()


HELLO: list[Any] = [{"role": "user", "content": "the hat in the ton"}]


def post(server: Server, body: Any, route: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + route, content=content, timeout=CEILING_S, **options)


def get(server: Server, route: str, **options: Any) -> httpx.Response:
    return httpx.get(server.url + route, timeout=CEILING_S, **options)


def metric(server: Server, name: str) -> float:
    for line in get(server, "/metrics").text.splitlines():
        if line.startswith(f"smallthinker_{name} "):
            return float(line.split()[-1])
    raise AssertionError(f"no metric {name}")


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": HELLO, "max_tokens": 2, **fields}


def ask_only(server: Server, **fields: Any) -> socket.socket:
    """Send a request and do not wait for its answer."""
    body = json.dumps(chat_body(**fields)).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=CEILING_S)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    return connection


def open_stream(server: Server, **fields: Any) -> socket.socket:
    """Start a streamed answer and return the connection once the first event has come."""
    connection = ask_only(server, stream=True, **fields)
    received = b""
    while b"data: " not in received:
        part = connection.recv(4096)
        assert part, received
        received += part
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    return received


def never_stopping() -> dict[str, Any]:
    """Options that keep the model from ending its answer."""
    return {"max_tokens": 1900, "logit_bias": {"264": -100, "266": -100}, "seed": 1}


def await_metric(server: Server, name: str, value: float) -> None:
    wait_for(lambda: metric(server, name) == value, f"{name} to be {value}")


def await_idle(server: Server) -> None:
    wait_for(lambda: metric(server, "running") + metric(server, "waiting") == 0, "an idle server")
