"""What a run did about spikes that must outlive its checkpoints: ``SpikeRecord(scratch, collectives, limits)``.

``spikes.json`` holds a stop, so that the next queued job does not train its way to the same spike, and the rewinds,
which say which steps are passed over. It is written before anything is discarded: a kill in between is put right when
the run resumes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.artifacts import write_json
from components.pretraining.processes.collectives import Collectives
from components.pretraining.training.guard import Limits, SpikeError

SPIKES_NAME = "spikes.json"


class SpikeRecord:
    """The first rank's file, known to every rank; creating it is a collective.

    Args:
        folder: the stage's scratch folder.
        collectives: of the main thread.
        limits: the guard's; a run that stopped under the same ones is refused.
        writes: whether this is the first rank.

    Raises:
        SpikeError: the run stopped at a spike, and nothing was changed since.
    """

    def __init__(self, folder: Path, collectives: Collectives, limits: Limits, writes: bool) -> None:
        self._path, self._writes, self._limits = folder / SPIKES_NAME, writes, asdict(limits)
        found: dict[str, Any] = {"stop": None, "rewinds": [], "return_to": None}
        if writes and self._path.exists():
            found = json.loads(self._path.read_text())
        self._values: dict[str, Any] = collectives.broadcast(found)
        stop = self._values["stop"]
        if stop is None:
            return
        if stop["limits"] == self._limits:
            raise SpikeError(
                f"This run stopped at step {stop['step']} and would do so again: {stop['reason']}. Set on_spike to "
                f"skip or rewind, or raise the limit that it passed; to try the same once more (a fault of the "
                f"hardware), delete {self._path}."
            )
        self._values["stop"] = None
        self._write()

    def _write(self) -> None:
        if self._writes:
            write_json(self._path, self._values)

    def stop(self, step: int, reason: str) -> None:
        """Remember that the run stops."""
        self._values["stop"] = {"step": step, "reason": reason, "limits": self._limits}
        self._write()

    def rewind(self, step: int, reason: str, batch: str, oldest: int) -> None:
        """Remember that the batches around ``step`` are passed over from now on.

        Args:
            step: where the spike was.
            reason: what was wrong with it.
            batch: its batch in words.
            oldest: step of the oldest checkpoint: the run cannot go back further.
        """
        around = self._limits["rewind_steps"]
        first = max(oldest, step - around)
        entry = {"step": step, "first": first, "last": step + around, "reason": reason, "batch": batch}
        self._values["rewinds"].append(entry)
        self._values["return_to"] = first
        self._write()

    @property
    def rewinds(self) -> int:
        """How many times the run went back."""
        return len(self._values["rewinds"])

    @property
    def return_to(self) -> int | None:
        """No checkpoint beyond this step may be resumed from: they know nothing of the last rewind."""
        step: int | None = self._values["return_to"]
        return step

    def returned(self) -> None:
        """The run is back, and the checkpoints that knew nothing of the rewind are gone."""
        if self._values["return_to"] is not None:
            self._values["return_to"] = None
            self._write()

    def passed_over(self, step: int) -> dict[str, Any] | None:
        """The rewind because of which ``step`` is passed over, or ``None``."""
        return next(
            (entry for entry in self._values["rewinds"] if entry["first"] <= step <= entry["last"]), None
        )
