"""A teacher's server that we start and that never outlives us: ``with ServerProcess(command, …) as server: …``.

The server runs in a process group of its own under ``watchdog.py``, which ends the group as soon as this process is
gone, ``kill -9`` included. A record of the group lies beside the log, so that a server whose watchdog was killed too is
found and ended at the next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from components.artifacts import StageError, write_json

_WATCHDOG = Path(__file__).with_name("watchdog.py")
_STOP_S = 12.0
_LOG_LINES = 12


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """One server: started by :meth:`start`, answering after :meth:`wait_ready`, ended on leaving the ``with``.

    Args:
        name: what to call it in messages.
        command: program and arguments.
        environment: variables to set beside our own.
        folder: where its log and its record go (a stage's scratch folder).
        ready_url: answers 200 once the server is up.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path, ready_url: str
    ):
        self.name = name
        self.command = list(command)
        self.environment = dict(environment)
        self.log_path = folder / "teacher.log"
        self.record_path = folder / "teacher.json"
        self.ready_url = ready_url
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog_pipe: int | None = None
        self._started = 0.0

    def start(self) -> None:
        """Start the server without waiting for it; a leftover of an earlier, killed run is ended first."""
        end_leftover(self.record_path)
        read_end, self._watchdog_pipe = os.pipe()
        try:
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_WATCHDOG), str(read_end), *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.environment},
                    pass_fds=(read_end,),
                    start_new_session=True,
                )
        except OSError as error:
            raise StageError(f"{self.name} could not be started: {error}") from error
        finally:
            os.close(read_end)
        self._started = time.monotonic()
        write_json(
            self.record_path,
            {"group": self._process.pid, "born": _start_time(self._process.pid), "name": self.name},
        )

    def wait_ready(self, timeout_s: float) -> float:
        """Wait until the server answers; seconds since it was started.

        Raises:
            StageError: it ended, or did not answer in time; the message ends with its last lines.
        """
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy
        while True:
            self.check_alive()
            try:
                with opener.open(self.ready_url, timeout=5) as answer:
                    if answer.status == 200:
                        return time.monotonic() - self._started
            except (urllib.error.URLError, OSError):
                pass
            if time.monotonic() - self._started > timeout_s:
                raise StageError(
                    f"{self.name} did not answer at {self.ready_url} within {timeout_s:.0f} s; raise "
                    f"teacher.start_timeout_s or look at its last lines:\n{self.last_lines()}"
                )
            time.sleep(0.2)

    def check_alive(self) -> None:
        """Raise a ``StageError`` with the server's last lines when it has ended."""
        code = self._process.poll() if self._process is not None else None
        if code is not None:
            raise StageError(
                f"{self.name} ended by itself with exit code {code}; its last lines:\n{self.last_lines()}"
            )

    def last_lines(self) -> str:
        """The end of the server's log, for messages."""
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        return "\n".join(f"  {line[:300]}" for line in lines[-_LOG_LINES:]) or "  (it wrote nothing)"

    def stop(self) -> None:
        """End the server and everything it started."""
        if self._watchdog_pipe is not None:
            os.close(self._watchdog_pipe)
            self._watchdog_pipe = None
        if self._process is not None:
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                pass
            finally:
                _kill_group(self._process.pid)
            self._process.wait()
            self._process = None
        self.record_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def end_leftover(record_path: Path) -> bool:
    """End the server that a record names, if it is still the same processes; whether there was one."""
    try:
        record: Any = json.loads(record_path.read_text())
        group, started = int(record["group"]), str(record["born"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    # The leader may be gone while members live on; a group id is not reused while it has members, so a group whose
    # leader is missing is ours, and one whose leader started at another time is not.
    found = _start_time(group) in (started, "") and _group_is_alive(group)
    if found:
        _kill_group(group)
    record_path.unlink(missing_ok=True)
    return found


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's clock ticks (field 22 of ``/proc/PID/stat``); empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
