"""The contract between a stage and whoever runs it.

A stage is a function ``run(context: StageContext) -> dict[str, float]`` in ``components.<stage>``. It reads
parents under ``context.inputs``, writes into ``context.out``, and returns its headline metrics. The runner
(``flows/runner.py``) then checksums the folder and writes the manifest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

METRICS_NAME = "metrics.jsonl"
# Exit code of every command and stage process for an error that the user can act on, the same as argparse's; a sentence
# on stderr says what it was. Exit code 1 means a defect.
EXIT_USER_ERROR = 2
# Something outside the run ended it (what sendmail calls EX_TEMPFAIL); a scheduler may start the same command again.
EXIT_RETRY = 75
# As a shell has it after Ctrl-C.
EXIT_INTERRUPTED = 130


class StageError(Exception):
    """A stage cannot go on; the message says what was wrong and what to do, in one or two sentences."""

    exit_code = EXIT_USER_ERROR


class StageAborted(StageError):
    """Something outside the stage ended it: a machine, a process that died or hung. The same command goes on."""

    exit_code = EXIT_RETRY


class StageInterrupted(StageError):
    """A signal asked the stage to stop; what it had is saved, and the same command goes on."""

    exit_code = EXIT_INTERRUPTED


def stage_error(exit_code: int, message: str) -> StageError:
    """The error that a process which ended with ``exit_code`` had met."""
    for kind in (StageAborted, StageInterrupted):
        if kind.exit_code == exit_code:
            return kind(message)
    return StageError(message)


@dataclass
class StageContext:
    """What a stage is given.

    Attributes:
        stage: the stage's name.
        recipe: the recipe's name.
        config: this stage's part of the recipe, as plain JSON values; parse it with the stage's config class.
        inputs: parents' folders by role. Read only.
        out: the artefact's folder. It may hold files of an earlier, killed attempt of the *same* fingerprint:
            a stage either resumes from them or overwrites them. Names starting with a dot are scratch: they
            are not part of the artefact, and are removed when it is finished.
        cache: folder shared by all stages and runs for verified downloads.
        peaks: what the stage's own processes say of their memory, where it has several; ends in the manifest.
    """

    stage: str
    recipe: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    cache: Path
    notes: list[str] = field(default_factory=list)
    peaks: Mapping[str, Any] | None = None
    _metrics_file: IO[str] | None = field(default=None, repr=False)

    @property
    def scratch(self) -> Path:
        """Folder for work in progress; survives a crash, removed when the stage has finished."""
        path = self.out / ".work"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line to ``metrics.jsonl``; the runner sends it to MLflow. Resuming stages append."""
        if self._metrics_file is None:
            self._metrics_file = (self.out / METRICS_NAME).open("a", buffering=1)
        line = {
            "step": step,
            "time_s": round(time.time(), 3),
            "metrics": {k: float(v) for k, v in metrics.items()},
        }
        self._metrics_file.write(json.dumps(line) + "\n")

    def note(self, sentence: str) -> None:
        """Record something a reviewer should know (a source left out, a limit met); it ends in the manifest."""
        self.notes.append(sentence)

    def close(self) -> None:
        """Flush and close the metrics file."""
        if self._metrics_file is not None:
            handle, self._metrics_file = self._metrics_file, None
            handle.close()
