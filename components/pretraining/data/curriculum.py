"""Where a step lies in the curriculum, and its learning rate: ``Curriculum(config).at(step)``.

Everything here is a pure function of the config and the step number, so that a resumed run needs no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from components.pretraining.config import PretrainConfig, TrainingStage


@dataclass(frozen=True)
class TrainingStageSpan:
    """A training stage and its half-open range of optimizer steps ``[start, end)``."""

    index: int
    name: str
    start: int
    end: int
    stage: TrainingStage


class Curriculum:
    """The run's training stages as consecutive ranges of optimizer steps."""

    def __init__(self, config: PretrainConfig) -> None:
        self._optimizer = config.optimizer
        spans: list[TrainingStageSpan] = []
        start = 0
        for index, stage in enumerate(config.stages):
            spans.append(TrainingStageSpan(index, f"stage{index + 1}", start, start + stage.steps, stage))
            start += stage.steps
        self.spans = tuple(spans)
        self.total_steps = start

    def at(self, step: int) -> TrainingStageSpan:
        """The training stage that optimizer step ``step`` (0-based) belongs to."""
        for span in self.spans:
            if span.start <= step < span.end:
                return span
        raise IndexError(f"step {step} is outside the run's {self.total_steps} steps")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then over all training stages down to ``final_lr_ratio`` of the peak.

        One cosine, or the peak rate and a decay at the end, whose steps are ``decay_share`` of the run's.
        """
        part = self._optimizer
        if step < part.warmup_steps:
            return part.peak_lr * (step + 1) / part.warmup_steps
        start = part.warmup_steps
        if part.schedule == "wsd":
            start = max(start, self.total_steps - round(part.decay_share * self.total_steps) - 1)
        progress = min(1.0, max(0, step - start) / max(1, self.total_steps - 1 - start))
        if part.schedule == "cosine":
            height = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            height = 1.0 - (progress if part.decay_shape == "linear" else math.sqrt(progress))
        return part.peak_lr * (part.final_lr_ratio + (1.0 - part.final_lr_ratio) * height)

    def tokens_before(self, step: int) -> int:
        """Training tokens consumed by all steps before ``step``."""
        return sum(
            (min(step, span.end) - span.start) * span.stage.context * span.stage.sequences_per_step
            for span in self.spans
            if step > span.start
        )
