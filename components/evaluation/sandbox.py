"""Executes generated programs only where they can do no harm: ``run_program(source, timeout_s=3)``.

Each program runs in a process of its own (``jail.py``) without network, files to write, further processes, or
more than its share of memory and time. ``probe()`` says why a machine cannot confine them; callers then leave
the programs unexecuted.
"""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from components.evaluation import jail

_JAIL = Path(jail.__file__)
_DEFAULT_MEMORY_BYTES = 512 << 20
_ESCAPES = """
import os, socket
leaks = []
def attempt(name, action):
    try:
        action()
        leaks.append(name)
    except (OSError, RuntimeError):
        pass
attempt("a process was started", os.fork)
attempt("a socket was opened", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
attempt("a file was written", lambda: open("escaped", "w"))
attempt("a foreign file was read", lambda: open("/etc/passwd"))
assert not leaks
"""


@dataclass(frozen=True)
class Verdict:
    """Outcome of a program: ``passed``, or why not (an exception's name, ``timeout``, ``killed``)."""

    passed: bool
    reason: str


class SandboxError(Exception):
    """This machine cannot confine programs; nothing was executed."""


def run_program(source: str, timeout_s: float = 3.0, memory_bytes: int = _DEFAULT_MEMORY_BYTES) -> Verdict:
    """Run a whole Python program; it passes when it ends without an exception.

    Args:
        source: the program. It sees the standard library and nothing else.
        timeout_s: wall-clock limit.
        memory_bytes: limit on its address space.

    Raises:
        SandboxError: the kernel offers no confinement; the program was not run.
    """
    password = secrets.token_hex(16)
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        with tempfile.TemporaryDirectory(prefix="program-") as folder:
            arguments = [str(writer), str(memory_bytes), str(math.ceil(timeout_s) + 1)]
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_JAIL), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": "/nonexistent", "HOME": folder, "LANG": "C.UTF-8"},
                pass_fds=(writer,),
                start_new_session=True,
            )
            try:
                process.communicate(f"{password}\n{source}".encode(errors="replace"), timeout=timeout_s)
            except subprocess.TimeoutExpired:
                return Verdict(False, "timeout")
            finally:
                process.kill()
                process.wait()
        if process.returncode == jail.UNCONFINED:
            raise SandboxError(
                "this machine cannot confine programs (Linux with Landlock and seccomp is needed)"
            )
        try:
            report = os.read(reader, 256).decode(errors="replace")
        except BlockingIOError:
            report = ""
    finally:
        os.close(reader)
        os.close(writer)
    if report == password and process.returncode == 0:
        return Verdict(True, "passed")
    if report.startswith("fail: "):
        return Verdict(False, report.removeprefix("fail: "))
    return Verdict(False, f"killed ({process.returncode})")


def probe() -> str | None:
    """``None`` when programs can be run safely here, else one sentence saying why not."""
    if not sys.platform.startswith("linux"):
        return f"programs are confined on Linux only, this is {sys.platform}"
    try:
        works = run_program("import math, typing, collections\nassert math.sqrt(4) == 2", timeout_s=20)
        if not works.passed:
            return f"a harmless program does not run in the sandbox ({works.reason})"
        confined = run_program(_ESCAPES, timeout_s=20)
    except (SandboxError, OSError) as error:
        return str(error)
    return None if confined.passed else f"the sandbox does not hold ({confined.reason})"
