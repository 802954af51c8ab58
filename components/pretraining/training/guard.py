"""Judges every step before the optimizer acts on it: ``LossGuard(ratio, "stop").judge(loss, grad_norm)``.

A non-finite loss or gradient norm, or a loss far above the recent median, ends the run or drops that step's
gradients. All ranks judge the same all-reduced values, so that they decide alike, and the state goes into checkpoints,
so that a resumed run does too.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, Literal

from components.artifacts import StageError, write_json

SKIPPED_NAME = "skipped_steps.json"


class LossGuard:
    """Stops a run, or skips steps, when the loss is non-finite or spikes.

    Args:
        ratio: a loss above this multiple of the recent median is a spike.
        policy: ``stop`` ends the run at the first complaint; ``skip`` drops the step's gradients and goes on.
        max_skips: steps dropped in a row after which the run ends all the same.
        window: steps that the median looks back on; nothing counts as a spike before half of it is filled.
    """

    def __init__(
        self,
        ratio: float,
        policy: Literal["stop", "skip"] = "stop",
        max_skips: int = 10,
        window: int = 64,
    ) -> None:
        self._ratio, self._policy, self._max_skips, self._window = ratio, policy, max_skips, window
        self.recent: list[float] = []
        self.in_a_row = 0
        self.skipped: list[dict[str, Any]] = []

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
        if len(self.recent) >= self._window // 2:
            median = statistics.median(self.recent)
            if loss > self._ratio * median:
                return (
                    f"the loss jumped to {loss:.4g}, more than {self._ratio:g} times "
                    f"the recent median of {median:.4g}"
                )
        return None

    def refuse(self, step: int, complaint: str, batch: str) -> None:
        """Stop the run, or remember that the step is skipped.

        Raises:
            StageError: names the step, the value and the batch, from which the step can be replayed.
        """
        replay = f"python -m components.pretraining.studies.replay FOLDER --step {step}"
        if self._policy == "stop":
            raise StageError(
                f"Training stopped at step {step}: {complaint}. Earlier checkpoints are kept. Look at the batch with "
                f"`{replay}`; then set on_spike to skip, raise spike_ratio or lower the learning rate. "
                f"The batch (category@first token): {batch}"
            )
        if self.in_a_row >= self._max_skips:
            raise StageError(
                f"Training stopped at step {step}: {complaint}, after {self.in_a_row} steps skipped in a row "
                f"(max_skips). Earlier checkpoints are kept. Look at the batch with `{replay}`. "
                f"The batch (category@first token): {batch}"
            )
        self.in_a_row += 1
        self.skipped.append({"step": step, "reason": complaint, "batch": batch})

    def accept(self, loss: float) -> None:
        """Remember a step that was taken."""
        self.recent = [*self.recent, loss][-self._window :]
        self.in_a_row = 0

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"recent": list(self.recent), "in_a_row": self.in_a_row, "skipped": list(self.skipped)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`to_state`."""
        self.recent = list(state["recent"])
        self.in_a_row, self.skipped = int(state["in_a_row"]), list(state["skipped"])

    def write(self, folder: Path) -> None:
        """Make ``skipped_steps.json`` say what this guard knows; there is none while nothing was skipped."""
        path = folder / SKIPPED_NAME
        if self.skipped:
            write_json(path, self.skipped)
        else:
            path.unlink(missing_ok=True)
