"""Decoding steps of several sequences as one pass over the weights.

    batcher = Batcher(lock, decode, most=16)
    batcher.step(session, token_id, row)     # from any thread; fills row with the logits
    batcher.leave(session)                   # the sequence is at its end

Whoever gets the engine's lock computes for everybody who waits. Sequences that have just been given their logits will
be back soon, so the one with the lock waits for them a moment: at most half a step. Nothing changes for a sequence
alone, and no output changes at all: a token's bits do not depend on what is computed beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import _core

Decode = Callable[[Sequence[_core.Session], NDArray[np.int32], NDArray[np.float32]], None]

_MOST_PATIENCE_S = 0.005


class _Step:
    def __init__(self, session: _core.Session, token_id: int, row: NDArray[np.float32]) -> None:
        self.session, self.token_id, self.row = session, token_id, row
        self.done = False
        self.error: Exception | None = None


class Batcher:
    """Combines steps. ``lock`` is the one under which the engine computes; ``decode`` runs with it held."""

    def __init__(self, lock: threading.Lock, decode: Decode, most: int) -> None:
        self._lock, self._decode, self._most = lock, decode, most
        self._changed = threading.Condition()
        self._waiting: list[_Step] = []
        self._last_seen: dict[int, float] = {}  # by id of the session: when it was given its logits
        self._step_s = 0.0

    def step(self, session: _core.Session, token_id: int, row: NDArray[np.float32]) -> None:
        """Append ``token_id`` to ``session``; ``row`` float32 [1, V] gets the logits after it.

        Raises:
            EngineError: weights cannot be read, or are damaged. The others of the pass are then tried alone.
        """
        mine = _Step(session, token_id, row)
        with self._changed:
            self._waiting.append(mine)
            self._changed.notify_all()
        while not mine.done:
            with self._lock:
                if not mine.done:
                    self._run(self._gather())
        if mine.error is not None:
            raise mine.error

    def leave(self, session: _core.Session) -> None:
        """Do not expect this sequence any more."""
        with self._changed:
            self._last_seen.pop(id(session), None)
            self._changed.notify_all()

    def _gather(self) -> list[_Step]:
        def all_here() -> bool:
            now = time.monotonic()
            waiting = {id(step.session) for step in self._waiting}
            late = [
                key
                for key, seen in self._last_seen.items()
                if key not in waiting and now - seen < 2 * self._step_s
            ]
            return not late or len(waiting) >= self._most

        with self._changed:
            self._changed.wait_for(all_here, timeout=min(self._step_s / 2, _MOST_PATIENCE_S))
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        return batch

    def _run(self, batch: list[_Step]) -> None:
        started = time.monotonic()
        try:
            self._compute(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].error = error
            else:
                for step in batch:
                    try:
                        self._compute([step])
                    except Exception as own:
                        step.error = own
        ended = time.monotonic()
        self._step_s = ended - started
        with self._changed:
            for step in batch:
                self._last_seen[id(step.session)] = ended
                step.done = True

    def _compute(self, batch: list[_Step]) -> None:
        ids = np.array([step.token_id for step in batch], np.int32)
        if len(batch) == 1:
            self._decode([batch[0].session], ids, batch[0].row)
            return
        rows = np.empty((len(batch), batch[0].row.shape[1]), np.float32)
        self._decode([step.session for step in batch], ids, rows)
        for step, row in zip(batch, rows, strict=True):
            step.row[0] = row
