"""Starting a run from another run's checkpoint: ``load_branch(engine, branch, store, ranks, collectives)``.

Weights, moments and the optimizer's step come along, to the bit and whatever processes wrote them; step number,
averages, guard and schedule are the new run's own. The other run's folder is only read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from components.artifacts import StageError
from components.pretraining.checkpoints.resharding import load_universal, universal
from components.pretraining.config import BranchPart
from components.pretraining.processes.collectives import Collectives
from components.pretraining.processes.ranks import Ranks
from components.weights.checkpoint_store import (
    CHECKSUMS_NAME,
    Checkpoint,
    CheckpointStore,
    DamagedCheckpointError,
    verify,
)


def identity(folder: Path) -> str:
    """What tells a checkpoint from every other: the SHA-256 over the checksums of its files.

    Raises:
        StageError: the folder is no sealed checkpoint.
    """
    try:
        found: str = json.loads((folder / CHECKSUMS_NAME).read_text())["self"]
    except (OSError, ValueError, KeyError) as error:
        raise StageError(
            f"{folder} is no checkpoint: its {CHECKSUMS_NAME} cannot be read. A finished run has none; copy one "
            "(the folder step-…) out of .work/checkpoints before the run ends."
        ) from error
    return found


def load_branch(
    engine: Any, branch: BranchPart, store: CheckpointStore, ranks: Ranks, collectives: Collectives
) -> int:
    """Fill a fresh engine with the checkpoint's weights and optimizer state; a collective.

    Returns:
        The step of the other run at which this one begins.

    Raises:
        StageError: it is missing, damaged or another one, or its model has other shapes.
    """
    folder = Path(branch.checkpoint)
    problem, step = "", 0
    mesh: dict[str, Any] = {}
    try:
        if identity(folder) != branch.identity:
            problem = f"it is another one than the config names: its identity is {identity(folder)}"
        else:
            step, mesh = verify(folder, ranks.rank, ranks.world)
    except (DamagedCheckpointError, OSError, StageError) as error:
        problem = str(error)
    problem = next((text for text in collectives.gather(problem) if text), "")
    if problem:
        raise StageError(f"The run cannot begin at the checkpoint {folder}: {problem}")
    converted = universal(store, Checkpoint(step, folder, mesh), ranks, collectives)
    load_universal(engine, converted)
    collectives.barrier()
    if ranks.is_first:
        shutil.rmtree(converted)  # it would be taken for this run's own
    return step
