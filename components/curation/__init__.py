"""The ``curate`` stage: real text read, extracted, filtered, scored, deduplicated, decontaminated and split."""

from __future__ import annotations

from components.artifacts import StageContext
from components.curation.config import CurateConfig

VERSION = 1

__all__ = ["VERSION", "CurateConfig", "run"]


def run(context: StageContext) -> dict[str, float]:
    """Run the stage; see :func:`components.curation.stage.run`."""
    from components.curation.stage import run as run_stage  # here: datatrove is slow to import

    return run_stage(context)
