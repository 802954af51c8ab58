"""What a run has finished besides weights: evaluations and the metrics file, made consistent on resume.

``RunRecord(scratch)`` keeps ``evaluations.json``; ``align_metrics(path, step, record)`` rewrites ``metrics.jsonl`` so
that it holds exactly what the uninterrupted run had logged when the resumed checkpoint was taken.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from components.artifacts import write_atomically, write_json

# Every training line has it, also one of an interval whose steps were all skipped.
TRAIN_KEY = "train/lr"
LOSS_KEY = "train/ce"
RUN_NAME = "run.json"


class RunRecord:
    """Finished evaluations by name (``stage1:start``, ``stage1:end``, ``bigram``); :meth:`put` is durable."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "evaluations.json"
        self.values: dict[str, Any] = {}
        if self._path.exists():
            self.values = json.loads(self._path.read_text())

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def put(self, name: str, value: dict[str, Any]) -> None:
        """Remember a finished evaluation, durably."""
        self.values[name] = value
        write_json(self._path, self.values)

    def forget_after(self, step: int) -> None:
        """Drop evaluations of a later step: the run resumes at ``step`` and makes them again."""
        for name in [name for name, entry in self.values.items() if entry.get("step", 0) > step]:
            del self.values[name]


def evaluation_metrics(name: str, entry: dict[str, Any]) -> dict[str, float]:
    """The line that an evaluation puts into ``metrics.jsonl``."""
    kind = "heldout_start" if name.endswith(":start") else "heldout"
    return {f"{kind}/bits_per_byte/{key}": float(value) for key, value in entry["bits_per_byte"].items()}


def _order(name: str) -> int:
    """Order of evaluations at one step: a training stage's end comes before the next one's start."""
    stage, _, moment = name.partition(":")
    return 2 * int(stage.removeprefix("stage")) + (1 if moment == "end" else 0)


def align_metrics(path: Path, step: int, record: RunRecord) -> None:
    """Cut ``metrics.jsonl`` back to checkpoint ``step``: no line missing, none twice, torn ones gone.

    Training lines up to ``step`` are kept as they are; evaluation lines are written anew from the record, since a
    crash may fall between recording and logging one.
    """
    training: list[tuple[int, int, dict[str, Any]]] = []
    times: dict[tuple[int, str], float] = {}
    if path.exists():
        for raw in path.read_bytes().split(b"\n"):
            try:
                line = json.loads(raw)
                number, metrics = int(line["step"]), line["metrics"]
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash
            if TRAIN_KEY in metrics:
                if number <= step:
                    training.append((number, 0, line))
            else:
                times[number, next(iter(metrics)).partition("/")[0]] = float(line["time_s"])
    lines = list(training)
    for name, entry in record.values.items():
        if name == "bigram" or entry["step"] > step:
            continue
        metrics = evaluation_metrics(name, entry)
        moment = times.get((entry["step"], next(iter(metrics)).partition("/")[0]), round(time.time(), 3))
        lines.append(
            (entry["step"], _order(name), {"step": entry["step"], "time_s": moment, "metrics": metrics})
        )
    unique = {(number, order): line for number, order, line in lines}
    text = "".join(json.dumps(unique[key]) + "\n" for key in sorted(unique))
    write_atomically(path, text.encode())


def describe_run(scratch: Path, config: dict[str, Any], tokens: Path) -> None:
    """Write down what a replay needs to know about a run."""
    write_json(scratch / RUN_NAME, {"config": config, "tokens": str(tokens.resolve())})
