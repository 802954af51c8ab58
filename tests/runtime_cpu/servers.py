"""Starts real server processes for tests: ``with running_server(MODEL, "--context", "256") as server: server.url``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "gguf"
MODEL = GOLDEN / "tiny-4b-q8_0.gguf"
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
