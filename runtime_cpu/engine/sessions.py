"""The sequence states of an engine, and who has them: ``with pool.borrow(prompt) as session``.

A state that is given back keeps its keys and values. The next prompt gets the idle state with which it shares the
longest beginning, and what they share is not computed again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import _core
from runtime_cpu.engine.scheduling import Scheduler


class EngineBusyError(_core.EngineError):
    """Every sequence state stayed in use for ``wait_s``: close a generation, or open with more ``sessions``."""


class SessionPool:
    """At most ``most`` states, made when they are first needed. Any thread may borrow."""

    def __init__(self, scheduler: Scheduler, most: int, wait_s: float) -> None:
        self._scheduler, self._most, self._wait_s = scheduler, most, wait_s
        self._changed = threading.Condition()
        self._idle: list[_core.Session] = []
        self._created = 0

    @contextmanager
    def borrow(self, prompt: NDArray[np.int32] | None) -> Iterator[_core.Session]:
        """A state cut back to what it shares with ``prompt`` [T] (to nothing when that is ``None``).

        At least the prompt's last token is left to compute: its logits are what comes next.

        Raises:
            EngineBusyError: none became idle in time.
            EngineError: the engine is closed.
        """
        session = self._take(prompt)
        try:
            keep = 0
            if prompt is not None and session.length:
                held = np.asarray(session.tokens()[: len(prompt) - 1], np.int32)
                differing = np.flatnonzero(held != prompt[: len(held)])
                keep = int(differing[0]) if differing.size else len(held)
            session.truncate(keep)
            session.take_counters()
            yield session
        finally:
            with self._changed:
                if self._scheduler.is_open:
                    self._idle.append(session)
                self._changed.notify()

    def close(self) -> None:
        """Free the idle states, once the scheduler is closed; borrowed ones are freed when they come back."""
        with self._changed:
            self._idle.clear()

    def _take(self, prompt: NDArray[np.int32] | None) -> _core.Session:
        deadline = time.monotonic() + self._wait_s
        with self._changed:
            while True:
                self._scheduler.check_open()
                if self._idle:
                    best = 0 if prompt is None else max(range(len(self._idle)), key=self._shared_with(prompt))
                    return self._idle.pop(best)
                if self._created < self._most:
                    session = self._scheduler.new_session()
                    self._created += 1
                    return session
                if not self._changed.wait(deadline - time.monotonic()):
                    raise EngineBusyError(
                        f"all {self._most} sequence states were in use for {self._wait_s:g} s; close a "
                        "generation, or open the engine with more sessions"
                    )

    def _shared_with(self, prompt: NDArray[np.int32]) -> Callable[[int], int]:
        """How many first tokens of ``prompt`` the idle state of an index holds."""
        wanted = prompt.tolist()

        def shared(index: int) -> int:
            count = 0
            for held, new in zip(self._idle[index].tokens(), wanted, strict=False):
                if held != new:
                    break
                count += 1
            return count

        return shared
