"""Starts real server processes for tests: ``with running_server(MODEL, "--context", "256") as server: server.url``."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "gguf"
MODEL = GOLDEN / "tiny-4b-q8_0.gguf"
NAME = MODEL.stem
CONTEXT = 2048
START_S = 60.0


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
def running_server(model: Path, *arguments: str) -> Iterator[Server]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(model, "--port", "0", "--threads", "1", *arguments),
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
        assert ready.wait(START_S), f"the server did not start: {lines}"
        found = re.search(r"http://\S+:\d+", "\n".join(lines))
        assert found, f"the server did not start: {lines}"
        yield Server(process, found.group(), lines)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stderr.close()


HELLO: list[Any] = [{"role": "user", "content": "the hat in the ton"}]


def post(server: Server, body: Any, route: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + route, content=content, timeout=60, **options)


def metric(server: Server, name: str) -> float:
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f"smallthinker_{name} "):
            return float(line.split()[-1])
    raise AssertionError(f"no metric {name}")


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": HELLO, "max_tokens": 2, **fields}


def open_stream(server: Server, **fields: Any) -> socket.socket:
    """Start a long streamed answer and return the connection once the first event has come."""
    body = json.dumps(chat_body(stream=True, **fields)).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    received = b""
    while b"data: " not in received:
        part = connection.recv(4096)
        assert part, received
        received += part
    return connection


def never_stopping() -> dict[str, Any]:
    """Options that keep the model from ending its answer."""
    return {"max_tokens": 1900, "logit_bias": {"264": -100, "266": -100}, "seed": 1}


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
