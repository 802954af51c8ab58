"""Picks one of the scored candidates: ``choose(scored, bits_per_byte_weight)``.

The rule: utility = mean score of the tasks - weight * (bits per byte / lowest bits per byte of the sweep - 1); the
highest utility wins, then the lower bits per byte, then the earlier candidate. Both figures come from development
items and held-out text; the final evaluation's items have no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.artifacts import StageError
from components.measures.task_suite import TaskScore


@dataclass(frozen=True)
class Scored:
    """A candidate and its scores.

    Attributes:
        weights: as configured, by checkpoint.
        tasks: score per task.
        bits_per_byte: by category and ``overall``.
    """

    weights: dict[str, float]
    tasks: dict[str, TaskScore]
    bits_per_byte: dict[str, float]

    @property
    def label(self) -> str:
        """The normalised weights as text: ``0.8 sft + 0.2 stage3``."""
        total = math.fsum(self.weights.values())
        return " + ".join(f"{weight / total:.3g} {name}" for name, weight in self.weights.items() if weight)

    @property
    def task_score(self) -> float:
        """Mean over the tasks."""
        return math.fsum(task.score.value for task in self.tasks.values()) / len(self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` reads them back."""
        return {
            "weights": self.weights,
            "tasks": {
                name: {"right": list(task.right), "answer_nats": task.answer_nats, "chance": task.chance}
                for name, task in self.tasks.items()
            },
            "bits_per_byte": self.bits_per_byte,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scored:
        """What :meth:`to_json` wrote."""
        tasks = {
            name: TaskScore(tuple(task["right"]), task["answer_nats"], task["chance"])
            for name, task in value["tasks"].items()
        }
        return cls(dict(value["weights"]), tasks, dict(value["bits_per_byte"]))


def utilities(scored: Sequence[Scored], bits_per_byte_weight: float) -> list[float]:
    """Utility of every candidate."""
    lowest = min(candidate.bits_per_byte["overall"] for candidate in scored)
    return [
        candidate.task_score - bits_per_byte_weight * (candidate.bits_per_byte["overall"] / lowest - 1.0)
        for candidate in scored
    ]


def choose(scored: Sequence[Scored], bits_per_byte_weight: float) -> int:
    """Index of the candidate that the rule picks."""
    values = utilities(scored, bits_per_byte_weight)
    return min(range(len(scored)), key=lambda i: (-values[i], scored[i].bits_per_byte["overall"], i))


def checkpoint_folder(name: str, pretrain: Path, posttrain: Path) -> Path:
    """The folder of a checkpoint that a candidate names.

    Raises:
        StageError: there is none of that name; lists those there are.
    """
    kept = sorted(path for path in (posttrain / "checkpoints").glob("*") if path.is_dir())
    known = {stage: pretrain / stage for stage in ("stage1", "stage2", "stage3")}
    known["sft"] = posttrain / "model"
    if kept:
        known["sft-mid"] = kept[0]
    known.update({path.name: path for path in kept})
    if name not in known:
        raise StageError(f"merge.candidates names the checkpoint {name!r}; there are {', '.join(known)}.")
    return known[name]
