"""Who computes when: every pass over an engine's weights goes through its :class:`Scheduler`, from any thread.

scheduler = Scheduler(runtime, chunk_tokens=256)
scheduler.forward(session, token_ids, logits)    # a chunk of a prompt, or a draft: alone
scheduler.step(session, token_id, logits)        # one decoding step: together with those of other sequences
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from runtime_cpu import _core
from runtime_cpu.engine.batching import Batcher

_MOST_TOGETHER = 16  # sequences in one step


class Scheduler:
    """Shares one runtime, which computes a single pass at a time, among all sequences of an engine.

    Attributes:
        chunk_tokens: the most tokens of one sequence that a pass takes.
    """

    def __init__(self, runtime: _core.Runtime, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._runtime: _core.Runtime | None = runtime
        self._lock = threading.Lock()
        self._batcher = Batcher(self._lock, self._decode, min(_MOST_TOGETHER, chunk_tokens))

    @property
    def is_open(self) -> bool:
        """Whether there is a runtime still."""
        return self._runtime is not None

    def check_open(self) -> None:
        """Refuse to go on with a closed engine.

        Raises:
            EngineError: it is closed.
        """
        self._open_runtime()

    def close(self) -> None:
        """Free the runtime when the pass that runs is at its end. Later passes raise :class:`EngineError`."""
        with self._lock:
            self._runtime = None

    def new_session(self) -> _core.Session:
        """An empty sequence state."""
        return self._open_runtime().new_session()

    def forward(
        self, session: _core.Session, token_ids: NDArray[np.int32], logits: NDArray[np.float32] | None
    ) -> None:
        """Append ``token_ids`` [T] to ``session``; fill ``logits`` [n, V] with its last n rows.

        Raises:
            EngineError: the engine is closed, or weights cannot be read.
        """
        with self._lock:
            self._open_runtime().forward(session, token_ids, logits=logits)

    def step(self, session: _core.Session, token_id: int, logits: NDArray[np.float32]) -> None:
        """Append ``token_id`` to ``session``; ``logits`` [1, V] gets the row after it (:meth:`Batcher.step`)."""
        self._batcher.step(session, token_id, logits)

    def leave(self, session: _core.Session) -> None:
        """Let nobody wait for another step of this sequence."""
        self._batcher.leave(session)

    def sample(
        self, sampler: _core.Sampler, row: NDArray[np.float32], top_logprobs: int
    ) -> tuple[int, float, list[tuple[int, float]]]:
        """Choose from ``row`` [V]: the id, its log-probability, and the ``top_logprobs`` most probable ones."""
        return self._open_runtime().sample(sampler, row, top_logprobs=top_logprobs)

    @contextmanager
    def head_rows(self, rows: str) -> Iterator[None]:
        """What a predicted head computes while the block runs: ``"all"`` rows, or the predictor's ``"scores"``."""
        with self._lock:
            self._open_runtime().set_head_rows(rows)
        try:
            yield
        finally:
            with self._lock:
                if self._runtime is not None:
                    self._runtime.set_head_rows("named")

    def _open_runtime(self) -> _core.Runtime:
        if self._runtime is None:
            raise _core.EngineError("the engine is closed; open it again with Engine.open")
        return self._runtime

    def _decode(
        self, sessions: Sequence[_core.Session], token_ids: NDArray[np.int32], logits: NDArray[np.float32]
    ) -> None:
        """Steps of several sequences as one pass; the batcher holds the lock."""
        self._open_runtime().decode(sessions, token_ids, logits=logits)
