"""Judges every step before the optimizer acts on it: ``LossGuard(limits).judge(loss, grad_norm)``.

A non-finite loss or gradient norm, or one far above its recent median, ends the run, drops that step's gradients or
sends the run back. All ranks judge the same all-reduced values, so that they decide alike, and the state goes into
checkpoints, so that a resumed run does too.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from components.artifacts import StageError, write_json

SKIPPED_NAME = "skipped_steps.json"
_SPAN_STEPS = 1000


class SpikeError(StageError):
    """The run stops at a spike; a restart with the same limits would meet it again."""


@dataclass(frozen=True)
class Limits:
    """What counts as a spike, and what follows.

    Attributes:
        policy: ``stop`` ends the run at the first complaint; ``skip`` drops the step's gradients and goes on;
            ``rewind`` goes back to an earlier checkpoint and then passes over the batches around the spike.
        ratio, grad_ratio: a loss, or a gradient norm, above this multiple of its recent median is a spike.
        max_skips, max_skips_per_1000: steps skipped in a row, or among the last 1,000, after which the run ends.
        rewind_steps: steps before and after a spike whose batches are passed over.
        max_rewinds: after which the run ends.
        window: steps that the medians look back on; nothing counts as a spike before half of it is filled.
    """

    policy: Literal["stop", "skip", "rewind"] = "stop"
    ratio: float = 1.75
    grad_ratio: float = 10.0
    max_skips: int = 10
    max_skips_per_1000: int = 50
    rewind_steps: int = 100
    max_rewinds: int = 10
    window: int = 64


class LossGuard:
    """Judges losses and gradient norms by their recent medians."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.recent: list[float] = []
        self.recent_norms: list[float] = []
        self.in_a_row = 0
        self.skipped: list[dict[str, Any]] = []

    def begin_training_stage(self) -> None:
        """Forget what is usual: another context and RoPE base have losses and norms of their own."""
        self.recent, self.recent_norms = [], []

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, or ``None``.

        Args:
            loss: mean over the global batch, in nats.
            grad_norm: global norm of the averaged gradients before clipping; non-finite when one of them is.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        if len(self.recent) >= self._limits.window // 2:
            for name, value, recent, ratio in (
                ("loss", loss, self.recent, self._limits.ratio),
                ("gradient's norm", grad_norm, self.recent_norms, self._limits.grad_ratio),
            ):
                median = statistics.median(recent)
                if value > ratio * median:
                    return (
                        f"the {name} jumped to {value:.4g}, more than {ratio:g} times "
                        f"the recent median of {median:.4g}"
                    )
        return None

    def refuse(self, step: int, complaint: str, batch: str) -> None:
        """Stop the run, or remember that the step is skipped; not for the policy ``rewind``.

        Raises:
            SpikeError: names the step, the value and the batch, from which the step can be replayed.
        """
        limits = self._limits
        if limits.policy == "stop":
            raise stopped(step, complaint, batch, "")
        if self.in_a_row >= limits.max_skips:
            raise stopped(
                step, complaint, batch, f", after {self.in_a_row} steps skipped in a row (max_skips)"
            )
        lately = sum(entry["last"] > step - _SPAN_STEPS for entry in self.skipped if entry["by"] == "skip")
        if lately >= limits.max_skips_per_1000:
            raise stopped(
                step,
                complaint,
                batch,
                f", after {lately} skipped among the last 1,000 steps (max_skips_per_1000)",
            )
        self.in_a_row += 1
        self._remember(step, complaint, batch, "skip")

    def pass_over(self, step: int, reason: str, batch: str) -> None:
        """Remember that the batch of ``step`` is passed over after a rewind, whose spike and batch are given."""
        entry = self.skipped[-1] if self.skipped else None
        if entry is not None and (entry["by"], entry["last"], entry["batch"]) == ("rewind", step - 1, batch):
            self.skipped[-1] = {**entry, "last": step}
        else:
            self._remember(step, reason, batch, "rewind")

    def _remember(self, step: int, reason: str, batch: str, by: str) -> None:
        self.skipped.append({"step": step, "last": step, "reason": reason, "batch": batch, "by": by})

    def accept(self, loss: float, grad_norm: float) -> None:
        """Remember a step that was taken."""
        self.recent = [*self.recent, loss][-self._limits.window :]
        self.recent_norms = [*self.recent_norms, grad_norm][-self._limits.window :]
        self.in_a_row = 0

    def notes(self) -> list[str]:
        """A sentence for every skip, for the manifest."""
        return [
            f"Step {entry['step']} was skipped: {entry['reason']}."
            if entry["by"] == "skip"
            else f"Steps {entry['step']} to {entry['last']} were passed over: {entry['reason']}."
            for entry in self.skipped
        ]

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "recent": list(self.recent),
            "recent_norms": list(self.recent_norms),
            "in_a_row": self.in_a_row,
            "skipped": list(self.skipped),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`to_state`."""
        self.recent, self.recent_norms = list(state["recent"]), list(state["recent_norms"])
        self.in_a_row, self.skipped = int(state["in_a_row"]), list(state["skipped"])

    def write(self, folder: Path) -> None:
        """Make ``skipped_steps.json`` say what this guard knows; there is none while nothing was skipped."""
        path = folder / SKIPPED_NAME
        if self.skipped:
            write_json(path, self.skipped)
        else:
            path.unlink(missing_ok=True)


def stopped(step: int, complaint: str, batch: str, after: str) -> SpikeError:
    """The error that ends a run; ``after`` says what was tried."""
    return SpikeError(
        f"Training stopped at step {step}: {complaint}{after}. Earlier checkpoints are kept. Look at the batch with "
        f"`python -m components.pretraining.studies.replay FOLDER --step {step}`; then set on_spike to skip or rewind, "
        f"raise the limit that it passed, or lower the learning rate. The batch (category@first token): {batch}"
    )
