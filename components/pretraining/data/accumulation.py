"""How a global batch is cut into micro-steps: ``accumulation_steps(config, stage=0, world=256)``."""

from __future__ import annotations

from components.artifacts import StageError
from components.pretraining.config import PretrainConfig


def groups_fit(groups: int, world: int) -> bool:
    """Whether ``world`` processes can share load-balance groups: several to a process, or the other way round."""
    return groups % world == 0 or world % groups == 0


def accumulation_steps(config: PretrainConfig, stage: int, world: int) -> int:
    """Micro-steps per optimizer step of one rank.

    Raises:
        StageError: the global batch or its groups cannot be cut evenly over ``world`` processes.
    """
    batch, micro = config.stages[stage].sequences_per_step, config.micro_batch(stage)
    if batch % (micro * world):
        raise StageError(
            f"The global batch of stage{stage + 1} is {batch} sequences; with {world} processes and micro-batches of "
            f"{micro} it must be a multiple of {micro * world}. Change sequences_per_step, sequences_per_micro_batch "
            "or processes."
        )
    groups = config.load_balance_groups
    if not groups_fit(groups, world):
        raise StageError(
            f"load_balance_groups is {groups}; with {world} processes a divisor or a multiple of {world} is allowed."
        )
    return batch // (micro * world)
