"""Processes that stop at an awaited instant by themselves, so that a test can kill or signal them exactly there.

    freeze_when(lambda: (out / "gguf").exists())         # in the process that is to be killed
    await_frozen(process.pid, lambda: process.poll() is None)   # in the test

A test that polls for the instant from outside may look too late: on a busy machine the process is done by then. The
condition is evaluated before every operation on files that Python audits; at the first at which it holds the process
sends itself a SIGSTOP. ``python -m tests.freezing FOLDER PATTERN MODULE ARGUMENTS...`` runs a module that stops once
FOLDER holds something like PATTERN, ``python -m tests.freezing --bytes N MODULE ARGUMENTS...`` one that the kernel
kills when it writes past the Nth byte of any file.
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tests.waiting import state_of, wait_for

_EVENTS = ("open", "os.", "shutil.", "tempfile.")


def freeze_when(seen: Callable[[], bool]) -> Callable[[], None]:
    """Stop this process (not its children) once at an operation on files at which ``seen()`` holds.

    Returns:
        A function that looks at once, for instants that no operation follows soon.
    """
    owner, looking, armed = os.getpid(), threading.local(), [True]

    def look() -> None:
        if not armed or os.getpid() != owner or getattr(looking, "now", False):
            return
        looking.now = True  # seen() itself works on files
        try:
            found = seen()
        finally:
            looking.now = False
        if found and armed:
            armed.clear()
            os.kill(owner, signal.SIGSTOP)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if armed and event.startswith(_EVENTS):
            look()

    sys.addaudithook(hook)
    return look


def await_frozen(pid: int, running: Callable[[], bool]) -> None:
    """Return when the process has stopped; ``running()`` says whether it can still come to that.

    Raises:
        AssertionError: it ended before.
    """

    def frozen() -> bool:
        if state_of(pid) == "T":
            return True
        assert running(), "the process ended before the awaited instant"
        return False

    wait_for(frozen, "the awaited instant")


def main(arguments: list[str]) -> None:
    """See the module's first lines."""
    if arguments[0] == "--bytes":
        limit, module, rest = int(arguments[1]), arguments[2], arguments[3:]
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it otherwise
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    else:
        folder, pattern, module, rest = Path(arguments[0]), arguments[1], arguments[2], arguments[3:]
        freeze_when(lambda: any(folder.glob(pattern)))
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
