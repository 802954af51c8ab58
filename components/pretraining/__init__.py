"""Stage ``pretrain``: three training stages on a DeepSpeed engine. ``run(context)``; see docs/pretraining.md.

Importing this package does not import torch.
"""

from __future__ import annotations

from components.artifacts import StageContext
from components.pretraining.config import PretrainConfig

VERSION = 2


def run(context: StageContext) -> dict[str, float]:
    """Train, or go on training, and write the stage's artefact; see :func:`components.pretraining.stage.run`."""
    from components.pretraining.stage import run as run_stage

    return run_stage(context)


__all__ = ["VERSION", "PretrainConfig", "run"]
