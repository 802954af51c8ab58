"""Servers that we start: ready, dying, silent, and never left behind, whatever is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from components.artifacts import PROJECT, StageContext, StageError
from components.synthesis import SynthesizeConfig, run
from components.synthesis.teacher.preflight import preflight
from components.synthesis.teacher.server import ServerProcess, end_leftover, free_port
from tests.waiting import CEILING_S, state_of, wait_for

# A server with a child of its own, as vLLM has: killing the one must not leave the other.
_PARENT = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(str(child.pid))
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def make(folder: Path, code: str = _PARENT) -> tuple[ServerProcess, Path]:
    port, child = free_port(), folder / "child.pid"
    command = [sys.executable, "-c", code, str(port), str(child)]
    return ServerProcess("the test server", command, {}, folder, f"http://127.0.0.1:{port}/"), child


def await_end(*pids: int) -> None:
    wait_for(lambda: not any(map(state_of, pids)), f"the end of {pids}")


def test_starts_answers_and_ends_with_its_children(tmp_path: Path) -> None:
    server, child_path = make(tmp_path)
    with server:
        assert server.wait_ready(CEILING_S) > 0
        child = int(child_path.read_text())
        assert state_of(child) and server.record_path.exists()
    await_end(child)
    assert not server.record_path.exists()


def test_one_that_ends_shows_its_last_lines(tmp_path: Path) -> None:
    server, _ = make(tmp_path, "import sys; print('no such model'); sys.exit(4)")
    with server, pytest.raises(StageError, match=r"(?s)exit code 4.*no such model"):
        server.wait_ready(CEILING_S)


def test_one_that_stays_silent_is_given_up(tmp_path: Path) -> None:
    server, _ = make(tmp_path, "import time; print('thinking', flush=True); time.sleep(600)")
    with server, pytest.raises(StageError, match=r"(?s)within 1 s.*thinking"):
        wait_for(lambda: "thinking" in server.last_lines(), "its first line")
        server.wait_ready(1)  # time is the subject: it never answers, so that any limit is exceeded


def test_missing_program(tmp_path: Path) -> None:
    server = ServerProcess("the test server", ["/no/such/program"], {}, tmp_path, "http://127.0.0.1:9/")
    with server, pytest.raises(StageError, match="ended by itself"):
        server.wait_ready(CEILING_S)


_OWNER = """
import sys, time
from pathlib import Path
from tests.synthesis.test_server import make
from tests.waiting import CEILING_S
server, child = make(Path(sys.argv[1]))
server.start()
server.wait_ready(CEILING_S)
print(server._process.pid, flush=True)
time.sleep(600)
"""


def _owner(folder: Path) -> tuple[subprocess.Popen[str], int, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=PROJECT
    )
    assert process.stdout is not None
    group = int(process.stdout.readline())
    return process, group, int((folder / "child.pid").read_text())


def test_nothing_outlives_a_killed_stage(tmp_path: Path) -> None:
    owner, group, child = _owner(tmp_path)
    assert state_of(child)
    owner.kill()
    owner.wait()
    await_end(child, group)


def test_leftovers_of_a_killed_watchdog_are_found_at_the_next_start(tmp_path: Path) -> None:
    owner, group, child = _owner(tmp_path)
    os.kill(group, signal.SIGSTOP)  # a watchdog that cannot act
    owner.kill()
    owner.wait()
    os.kill(group, signal.SIGKILL)
    await_end(group)
    assert state_of(child)
    assert end_leftover(tmp_path / "teacher.json")
    await_end(child)
    assert not end_leftover(tmp_path / "teacher.json")


def test_a_record_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    record = tmp_path / "teacher.json"
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    ) as other:
        record.write_text(json.dumps({"group": other.pid, "born": "12345", "name": "x"}))
        assert not end_leftover(record)
        assert state_of(other.pid)
        other.kill()
    for torn in ("", "{", "[]", '{"group": "x"}'):
        record.write_text(torn)
        assert not end_leftover(record)


def test_preflight_names_what_is_missing_and_the_alternatives(tmp_path: Path) -> None:
    def problems(**teacher: object) -> list[str]:
        return preflight(SynthesizeConfig.model_validate({"teacher": teacher}))

    (only,) = problems(kind="vllm", environment=str(tmp_path / "none"))
    assert "make teacher" in only and "kind=endpoint" in only and "kind=engine" in only
    ready = tmp_path / "venv"
    (ready / "bin").mkdir(parents=True)
    (ready / "bin/python").touch()
    (ready / ".ready").touch()
    assert problems(kind="vllm", environment=str(ready)) == []
    (only,) = problems(kind="vllm", environment=str(ready), weights=str(tmp_path / "nothing"))
    assert "nothing" in only and "packages.toml" in only
    (only,) = problems(kind="endpoint", base_url="http://127.0.0.1:9/v1", model="m")
    assert "http://127.0.0.1:9/v1" in only and "kind=engine" in only
    assert any("none.gguf" in line for line in problems(kind="engine", engine_model="none.gguf"))


@pytest.mark.skipif(
    importlib.util.find_spec("runtime_cpu.serve") is None, reason="the engine has no server here"
)
def test_our_own_engine_as_teacher(context: Callable[..., StageContext]) -> None:
    """A random model speaks the protocol; the filters drop what it says and count it."""
    model = "tests/golden/gguf/tiny-4b-q8_0.gguf"
    made = context(
        teacher={"kind": "engine", "engine_model": model, "concurrency": 2},
        mga={"documents": {"general": 3}, "max_tokens": 12, "source_chars": 250},
        personas={"from_documents": 1, "problems": 0, "questions": 1, "short_max_tokens": 8},
        tasks={"topic_rows": 5, "arithmetic_rows": 0, "generated_rows": {}},
    )
    metrics = run(made)
    counts = json.loads((made.out / "counts.json").read_text())
    assert metrics["requests"] == 5 and metrics["documents"] == 0
    assert counts["items"]["mga"]["planned"] == 3 and sum(counts["items"]["mga"]["rejected"].values()) == 3
