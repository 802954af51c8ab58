"""Saves, seals and finds checkpoints with all processes: ``Saver(store, ranks, mesh).save(engine, step, state)``.

DeepSpeed writes while training waits. Checksumming, flushing and the rename that makes the checkpoint visible are each
process's work on the files that it wrote itself, in a background thread if wanted: then training goes on meanwhile,
and what needs the checkpoint (the next save, the record of an evaluation, an export, the end) waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.artifacts import StageError
from components.pretraining.deepspeed.engine import save_engine
from components.pretraining.processes.collectives import Collectives
from components.pretraining.processes.ranks import Ranks
from components.weights.checkpoint_store import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    checksum,
    complaint,
)


@contextmanager
def files_written(engine: Any) -> Iterator[list[Path]]:
    """The files that this process writes through the engine within the block.

    A file is flushed by the machine that wrote it: elsewhere an ``fsync`` need not reach its pages.
    """
    written: list[Path] = []
    writer = engine.checkpoint_engine
    save = writer.save

    def remember(state_dict: Any, path: str) -> Any:
        written.append(Path(path))
        return save(state_dict, path)

    writer.save = remember
    try:
        yield written
    finally:
        del writer.save  # the class's own shows again


class Saver:
    """Writes the checkpoints of one run, with all its processes.

    Args:
        store: where they go; only the first process changes it.
        ranks: this process's place.
        mesh: how the processes divide the state, recorded with each checkpoint.
        in_background: whether sealing leaves training free to go on.
    """

    def __init__(
        self, store: CheckpointStore, ranks: Ranks, mesh: Mapping[str, Any], in_background: bool
    ) -> None:
        self._store, self._ranks, self._mesh, self._in_background = store, ranks, dict(mesh), in_background
        # The thread's messages must not meet those of the main thread.
        self._collectives, self._sealing = Collectives(ranks), Collectives(ranks)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint. With ``in_background`` it is not visible before :meth:`wait` has returned.

        Raises:
            StageError: the checkpoint before this one could not be sealed.
            OSError: likewise, with its cause in this process.
        """
        self.wait()
        draft = self._collectives.broadcast(self._store.prepare(step) if self._ranks.is_first else Path())
        with files_written(engine) as written:
            save_engine(engine, draft, state)
        names = sorted({path.relative_to(draft).as_posix() for path in written})
        if self._in_background:
            self._thread = threading.Thread(
                target=self._seal, args=(step, draft, names), name=f"seal-{step}", daemon=True
            )
            self._thread.start()
        else:
            self._seal(step, draft, names)
            self.wait()

    def _seal(self, step: int, draft: Path, names: list[str]) -> None:
        """Flush, checksum and commit; every process learns how it ended."""
        try:
            entries: dict[str, Any] = {}
            problem: Exception | None = None
            try:
                entries = checksum(draft, names)
            except OSError as error:
                problem = error
            parts = self._sealing.gather((entries, str(problem or "")))
            words = next((text for _, text in parts if text), "")
            if not words and self._ranks.is_first:
                try:
                    together = {name: entry for part, _ in parts for name, entry in part.items()}
                    self._store.commit(step, self._mesh, together)
                except (OSError, CheckpointError) as error:
                    problem, words = error, str(error)
            words = self._sealing.broadcast(words)
            if problem is None and words:
                problem = StageError(f"The checkpoint of step {step} could not be sealed: {words}")
            self._error = problem
        except Exception as error:  # of the channel: another process died; the main thread raises it
            self._error = error

    def wait(self) -> None:
        """Return when no checkpoint is in flight.

        Raises:
            StageError: it could not be sealed; earlier ones are untouched.
            OSError: likewise, with its cause in this process.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """:meth:`wait` on the way out of an error, which must not be hidden by another."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._error = None


def find_newest(
    store: CheckpointStore, at_most: int | None, ranks: Ranks, collectives: Collectives
) -> tuple[Checkpoint | None, list[str]]:
    """:meth:`CheckpointStore.newest`, every process verifying its share of the bytes; all get the same answer.

    Args:
        store: the run's checkpoints.
        at_most: a step to go back behind, as the first process knows it.
        ranks: this process's place.
        collectives: the main thread's channel.
    """
    wanted = [step for step in reversed(store.steps()) if at_most is None or step <= at_most]
    complaints: list[str] = []
    for step in collectives.broadcast(wanted):
        found: Checkpoint | None = None
        words = ""
        try:
            found = store.verify(step, ranks.rank, ranks.world)
        except (CheckpointError, OSError) as error:
            words = complaint(error if isinstance(error, CheckpointError) else CheckpointError(str(error)))
        first = next((text for text in collectives.gather(words) if text), "")
        if not first:
            return found, complaints
        complaints.append(first)
    return None, complaints
