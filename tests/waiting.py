"""Waiting for what happens instead of for time to pass: ``wait_for(lambda: marker.exists(), "the marker")``.

A test's verdict may depend on what happens and in which order, never on how long it takes: the machine may be busy.
Ceilings only turn a hang into a failure, so they are far above anything that is ever waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

CEILING_S = 600.0


def wait_for(condition: Callable[[], Found], what: str, ceiling_s: float = CEILING_S) -> Found:
    """Poll until ``condition()`` holds, and return what it gave; an exception of its own ends the waiting.

    Raises:
        AssertionError: ``what`` did not come within ``ceiling_s`` seconds, which means that it never will.
    """
    end_s = time.monotonic() + ceiling_s
    while not (found := condition()):
        # time is the subject: a hang becomes a failure here, once for all tests
        assert time.monotonic() < end_s, f"waited {ceiling_s:.0f} s in vain for {what}"
        time.sleep(0.005)
    return found


def state_of(pid: int) -> str:
    """The kernel's letter for a process (``T`` is stopped); empty when it is gone or a zombie."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return "" if letter in "ZX" else letter
