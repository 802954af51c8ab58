"""Runs a command of the engine whose answers have no end: ``python -m tests.runtime_cpu.endless MODULE ...``.

No token stops an answer, and each takes at least 20 ms: an answer of 16000 tokens takes five minutes on the fastest
machine and longer on others, so that whoever cancels it is never too late.
"""

from __future__ import annotations

import runpy
import sys
import time
from typing import Any

from runtime_cpu import Engine
from runtime_cpu.generation import Generation, Token

_generate, _next = Engine.generate, Generation.__next__


def generate(self: Engine, *arguments: Any, **named: Any) -> Generation:
    return _generate(self, *arguments, **{**named, "stop_ids": ()})


def slow_next(self: Generation) -> Token:
    time.sleep(
        0.02
    )  # time is the subject: the shortest that a token may take, nothing waits for it to be over
    return _next(self)


if __name__ == "__main__":
    Engine.generate, Generation.__next__ = generate, slow_next  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
