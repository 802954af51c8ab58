"""Saves, seals and finds checkpoints on all ranks: ``Saver(store, ranks, mesh).save(engine, step, state)``.

DeepSpeed writes while training waits. Sealing follows: every rank fsyncs and checksums the files that it wrote itself,
then the first rank renames the folder, which makes the checkpoint visible. It can run in a background thread: then
training goes on meanwhile, and whatever needs the checkpoint (the next save, the record of an evaluation, an export,
the end of the run) waits for it.
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
    CheckpointStore,
    DamagedCheckpointError,
    checksum,
    complaint,
)


@contextmanager
def files_written(engine: Any) -> Iterator[list[Path]]:
    """The files that this rank writes through the engine within the block.

    A file must be fsynced on the host that wrote it: on another one ``fsync`` need not reach its page cache.
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
        del writer.save  # so that the class's method is seen again


class Saver:
    """Writes the checkpoints of one run; every rank has one and calls it alike.

    Args:
        store: where they go; only the first rank changes it.
        ranks: this process's place.
        mesh: how the ranks partition the state, recorded with each checkpoint.
        in_background: seal in a thread, while training goes on.
    """

    def __init__(
        self, store: CheckpointStore, ranks: Ranks, mesh: Mapping[str, Any], in_background: bool
    ) -> None:
        self._store, self._ranks, self._mesh, self._in_background = store, ranks, dict(mesh), in_background
        # The sealing thread has a process group of its own: its collectives must not interleave with the main thread's.
        self._collectives, self._sealing = Collectives(ranks), Collectives(ranks)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint. With ``in_background`` it is not visible before :meth:`wait` has returned.

        Raises:
            StageError: the checkpoint before this one could not be sealed.
            OSError: likewise, with its cause on this rank.
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
        """Fsync, checksum and commit; every rank gets the same outcome."""
        try:
            entries: dict[str, Any] = {}
            problem: Exception | None = None
            try:
                entries = checksum(draft, names)
            except OSError as error:
                problem = error
            parts = self._sealing.gather((entries, str(problem or "")))
            reason = next((text for _, text in parts if text), "")
            if not reason and self._ranks.is_first:
                try:
                    merged = {name: entry for part, _ in parts for name, entry in part.items()}
                    self._store.commit(step, self._mesh, merged)
                except (OSError, DamagedCheckpointError) as error:
                    problem, reason = error, str(error)
            reason = self._sealing.broadcast(reason)
            if problem is None and reason:
                problem = StageError(f"The checkpoint of step {step} could not be sealed: {reason}")
            self._error = problem
        except Exception as error:  # a collective failed because another rank died; the main thread raises it
            self._error = error

    def wait(self) -> None:
        """Return when no checkpoint is being sealed.

        Raises:
            StageError: it could not be sealed; earlier ones are untouched.
            OSError: likewise, with its cause on this rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Like :meth:`wait`, without raising: for the way out of an error, which another must not hide."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._error = None


def find_newest(
    store: CheckpointStore, at_most: int | None, ranks: Ranks, collectives: Collectives
) -> tuple[Checkpoint | None, list[str]]:
    """:meth:`CheckpointStore.newest`, every rank verifying its share of the bytes; all get the same answer.

    Args:
        store: the run's checkpoints.
        at_most: newest step that may be taken; the first rank's value counts.
        ranks: this process's place.
        collectives: of the main thread.
    """
    wanted = [step for step in reversed(store.steps()) if at_most is None or step <= at_most]
    complaints: list[str] = []
    for step in collectives.broadcast(wanted):
        found: Checkpoint | None = None
        damage = ""
        try:
            found = store.verify(step, ranks.rank, ranks.world)
        except (DamagedCheckpointError, OSError) as error:
            damage = complaint(error)
        first = next((text for text in collectives.gather(damage) if text), "")
        if not first:
            return found, complaints
        complaints.append(first)
    return None, complaints
