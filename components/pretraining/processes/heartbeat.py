"""Where a process of a run stands, for the watch of its node: ``beat(step, "step", limit_s)``.

A beat is a small file on the node itself, rewritten in place: it costs microseconds, needs no other process, and what
it said last can be read when the process can say nothing any more. :mod:`components.pretraining.node` reads it; without
that (a run of one process, a test) nothing is written.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "SMALLTHINKER_BEATS"
STACKS_SIGNAL = signal.SIGUSR1
_LENGTH = 256  # bytes, always, so that a beat replaces all of the one before


@dataclass(frozen=True)
class Beat:
    """What a process last said.

    Attributes:
        count: of beats so far; a new one is progress.
        pid: the process.
        step: the optimizer step that it is at.
        doing: what it is doing there.
        limit_s: how long that may take before it counts as hung.
    """

    count: int
    pid: int
    step: int
    doing: str
    limit_s: float


def beat_path(folder: Path, rank: int) -> Path:
    """Where a rank's beats are."""
    return folder / f"beat-{rank:05}"


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it gets :data:`STACKS_SIGNAL`."""
    return folder / f"stacks-{rank:05}"


def read_beats(folder: Path) -> dict[int, Beat]:
    """Every rank's last beat; one that is just being written is left out."""
    beats = {}
    for path in sorted(folder.glob("beat-*")):
        try:
            beats[int(path.name.removeprefix("beat-"))] = Beat(**json.loads(path.read_bytes()))
        except (ValueError, TypeError, OSError):
            continue
    return beats


class _Heart:
    """This process's beats."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._count, self._last = 0, (0, "", 0.0)

    def _open(self) -> int | None:
        folder = os.environ.get(FOLDER_VARIABLE)
        if self._descriptor is None and folder:
            rank = int(os.environ["RANK"])
            # The handler is C and needs no interpreter: it works while Python waits in a collective.
            stacks = stacks_path(Path(folder), rank).open("w")
            faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True)
            self._descriptor = os.open(beat_path(Path(folder), rank), os.O_WRONLY | os.O_CREAT)
        return self._descriptor

    def beat(self, step: int, doing: str, limit_s: float) -> None:
        """Say that this process is alive and what it does now, for at most ``limit_s`` seconds until the next beat."""
        descriptor = self._open()
        if descriptor is None:
            return
        self._count, self._last = self._count + 1, (step, doing, limit_s)
        values = {
            "count": self._count, "pid": os.getpid(), "step": step, "doing": doing, "limit_s": limit_s
        }  # fmt: skip
        os.pwrite(descriptor, json.dumps(values).encode().ljust(_LENGTH), 0)

    def beat_on(self, doing: str) -> None:
        """A beat from within what the last one named, under its limit; before the first one, nothing."""
        if self._count:
            step, _, limit_s = self._last
            self.beat(step, doing, limit_s)


_HEART = _Heart()
beat, beat_on = _HEART.beat, _HEART.beat_on
