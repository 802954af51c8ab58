"""Programs that try to get out of the sandbox, and programs that must be judged rightly inside it."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path

import psutil
import pytest

from components.evaluation import sandbox
from components.evaluation.sandbox import Verdict, probe, run_program
from tests.waiting import CEILING_S

REASON = probe()
confined = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SYSCALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def denied(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *arguments)
    assert result == -1 and ctypes.get_errno() == 1, (number, result, ctypes.get_errno())
"""


@confined
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = 1", "passed"),
        ("import math, re, json, random, datetime\nassert math.sqrt(9) == 3", "passed"),
        ("assert 1 == 2", "AssertionError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("def f(:", "SyntaxError"),
        ("x = [0] * 10**10", "MemoryError"),
        ("import torch", "ModuleNotFoundError"),
        ("\ud800", "SyntaxError"),
        ("", "passed"),
    ],
)
def test_verdicts(program: str, reason: str) -> None:
    assert run_program(program, timeout_s=CEILING_S) == Verdict(reason == "passed", reason)


@confined
@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(3600)", "i = 1\nwhile 1: i += 1"]
)
def test_endless_programs_are_stopped(program: str) -> None:
    # time is the subject: the programs have no end, so that any limit is exceeded
    assert run_program(program, timeout_s=0.6) == Verdict(False, "timeout")


@confined
@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['ls'])",
        "import os; os.execv('/bin/sh', ['sh', '-c', 'true'])",
        "import os; os.posix_spawn('/bin/ls', ['ls'], {})",
        "import threading\nwhile True: threading.Thread(target=print).start()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import socket; socket.create_connection(('127.0.0.1', 80))",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1/')",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.listdir('/')",
        "import os; os.listdir(os.environ['HOME'])",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "open('/proc/1/mem', 'rb')",
        "open('here', 'w')",
        "import os; os.mkdir('here')",
        "import os; os.open('here', os.O_CREAT)",
        "import tempfile; tempfile.NamedTemporaryFile()",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import os; os.setuid(0)",
        "import os; os.chroot('/')",
        "import os; os.memfd_create('x')",
    ],
)
def test_escapes_fail(program: str) -> None:
    verdict = run_program(program, timeout_s=CEILING_S)
    assert not verdict.passed
    assert verdict.reason in (
        "PermissionError",
        "RuntimeError",
        "FileNotFoundError",
        "URLError",
        "ValueError",
    ), verdict


@confined
def test_a_file_of_the_user_survives(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o666)
    for action in (
        "open({0!r}, 'a').write('x')",
        "import os; os.unlink({0!r})",
        "import os; os.open({0!r}, os.O_RDONLY | os.O_TRUNC)",
        "import os; os.truncate({0!r}, 0)",
        "import os; os.rename({0!r}, {0!r} + '2')",
        "import os; os.chmod({0!r}, 0)",
        "open({0!r}).read()",
    ):
        assert not run_program(action.format(str(victim)), timeout_s=CEILING_S).passed
    assert victim.read_text() == "precious"
    assert os.listdir(tmp_path) == ["victim"]  # noqa: PTH208


@confined
@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")
@pytest.mark.parametrize(
    "call",
    [
        "41, 2, 1, 0",  # socket
        "57",  # fork
        "435, None, 0",  # clone3
        "425, 1, None",  # io_uring_setup
        "101, 0, 0, 0, 0",  # ptrace
        "310, 1, None, 0, None, 0, 0",  # process_vm_readv
        "0x40000000 + 41, 2, 1, 0",  # socket in the x32 numbering
        "157, 15, 0, 0, 0, 0",  # prctl
        "272, 0x10000000",  # unshare
        "165, None, None, None, 0, None",  # mount
    ],
)
def test_raw_system_calls_are_denied(call: str) -> None:
    assert run_program(f"{SYSCALL}denied({call})", timeout_s=CEILING_S) == Verdict(True, "passed")


@confined
def test_claiming_success_is_not_success() -> None:
    assert not run_program("import os; os._exit(0)", timeout_s=CEILING_S).passed
    claim = "import os\nfor fd in range(3, 32):\n  try: os.write(fd, b'pass')\n  except OSError: pass\nos._exit(0)"
    assert not run_program(claim, timeout_s=CEILING_S).passed


@confined
def test_flooding_the_report_only_stops_the_program() -> None:
    flood = (
        "import os\nwhile True:\n  for fd in range(3, 32):\n"
        "    try: os.write(fd, b'x' * 65536)\n    except OSError: pass"
    )
    # time is the subject: the flood has no end, so that any limit is exceeded
    assert not run_program(flood, timeout_s=0.8).passed
    assert run_program("print('x' * 10**7)", timeout_s=CEILING_S).passed


@confined
def test_programs_do_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s")
    assert run_program("import os; assert 'SECRET_TOKEN' not in os.environ", timeout_s=CEILING_S).passed


@confined
def test_no_descriptor_or_process_is_left() -> None:
    gc.collect()  # what other tests left open
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        # time is the subject: the program has no end, so that any limit is exceeded
        run_program("while True: pass", timeout_s=0.3)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= children


def test_a_sandbox_that_does_not_hold_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe really looks: with a program that succeeds at escaping, it says so."""
    monkeypatch.setattr(sandbox, "_ESCAPES", "assert not ['a file was written']")
    assert "does not hold" in str(probe()) or REASON is not None
