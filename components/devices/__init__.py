"""The ``benchmark`` stage: what the exported model costs and how well it predicts, on the devices at hand."""

from __future__ import annotations

from components.artifacts import StageContext
from components.devices.config import BenchmarkConfig

VERSION = 1

__all__ = ["VERSION", "BenchmarkConfig", "run"]


def run(context: StageContext) -> dict[str, float]:
    """Run the stage; see :func:`components.devices.stage.run`."""
    from components.devices.stage import run as run_stage  # here: torch and matplotlib are slow to import

    return run_stage(context)
