"""Runs one or several generations at a time in threads of their own, and keeps a bounded queue before them.

worker = Worker(engine, metrics, max_waiting=8, parallel=2)
with worker.admit() as ticket:                 # ApiError 429 when the queue is full
    async for tokens in ticket.run(prompt_ids, max_tokens=64, temperature=0.0):
        ...                                    # leaving early cancels the generation
    ticket.stats.finish_reason
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from runtime_cpu.engine.engine import Engine
from runtime_cpu.engine.sampling import Token
from runtime_cpu.engine.stats import Stats
from runtime_cpu.serve.errors import ApiError
from runtime_cpu.serve.metrics import ServerMetrics

_HEARTBEAT_S = 10.0


class Worker:
    """Owner of the engine on behalf of all connections. Use from one event loop."""

    def __init__(self, engine: Engine, metrics: ServerMetrics, max_waiting: int, parallel: int = 1) -> None:
        self.engine = engine
        self.metrics = metrics
        self._max_waiting = max_waiting
        self._admitted = 0
        self._parallel = parallel
        # Its queue is the order in which requests take their turns.
        self._pool = ThreadPoolExecutor(max_workers=parallel, thread_name_prefix="generate")
        self._closing = threading.Event()

    def admit(self) -> Ticket:
        """A place in the queue.

        Raises:
            ApiError: 429 when ``parallel`` generations run and ``max_waiting`` more wait; 503 when shutting down.
        """
        if self._closing.is_set():
            raise ApiError(
                503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"}
            )
        if self._admitted >= self._max_waiting + self._parallel:
            run = "one request runs" if self._parallel == 1 else f"{self._parallel} requests run"
            raise ApiError(
                429,
                f"the queue is full: {run} and {self._max_waiting} wait; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        return Ticket(self)

    def close(self) -> None:
        """Cancel what runs and wait for its thread."""
        self._closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _count(self, change: int) -> None:
        self._admitted += change
        self.metrics.admitted = self._admitted


class Ticket:
    """One request's place, from admission to its end. Leave the ``with`` block to give it up."""

    def __init__(self, worker: Worker) -> None:
        self.stats = Stats()
        self._worker = worker
        self._cancelled = threading.Event()
        self._work: asyncio.Future[None] | None = None
        worker._count(+1)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cancelled.set()
        if self._work is None:
            self._worker._count(-1)

    async def run(self, prompt: Sequence[int], **options: Any) -> AsyncIterator[list[Token]]:
        """Wait for the turn, then generate; yields the tokens that came since the last time.

        An empty list says that ten seconds went by without a token. Errors of the engine are raised here.
        """
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[Token | Exception | None] = asyncio.Queue()

        def put(item: Token | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(arrivals.put_nowait, item)

        self._work = loop.run_in_executor(self._worker._pool, self._pump, prompt, options, put)
        # The place is free when the thread has let go of the engine, however slowly the client reads.
        self._work.add_done_callback(lambda _: self._worker._count(-1))
        try:
            while True:
                try:
                    batch = [await asyncio.wait_for(arrivals.get(), _HEARTBEAT_S)]
                except TimeoutError:
                    yield []
                    continue
                while not arrivals.empty():
                    batch.append(arrivals.get_nowait())
                tokens = [item for item in batch if isinstance(item, Token)]
                if tokens:
                    yield tokens
                if isinstance(batch[-1], Exception):
                    raise batch[-1]
                if batch[-1] is None:
                    return
        finally:
            self._cancelled.set()

    def _pump(
        self, prompt: Sequence[int], options: dict[str, Any], put: Callable[[Token | Exception | None], None]
    ) -> None:
        metrics = self._worker.metrics
        if self._cancelled.is_set():
            return
        metrics.count_running(+1)
        end: Exception | None = None
        try:
            with self._worker.engine.generate(prompt, **options) as generation:
                self.stats = generation.stats
                for token in generation:
                    if self._cancelled.is_set() or self._worker._closing.is_set():
                        break
                    put(token)
        except Exception as error:
            end = error
        metrics.count_running(-1)
        metrics.count_generation(self.stats)
        put(end)
