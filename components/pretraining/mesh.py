"""Where a process stands among those of the run: ``Mesh(rank=5, world=8, expert_parallel=4).local_experts(32)``.

The mesh is data x expert: neighbouring ranks share one copy of the experts, everything else is data parallel over all
ranks. With 8 ranks and ``expert_parallel`` 4, ranks 0-3 and 4-7 hold one copy each, and ranks 1 and 5 the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from components.artifacts import StageError
from components.pretraining.config import PretrainConfig

_STACKS = {"w1": "gate_up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Mesh:
    """One process's place.

    Attributes:
        rank, world: of the process group.
        expert_parallel: ranks that share one copy of the experts.
    """

    rank: int = 0
    world: int = 1
    expert_parallel: int = 1

    @property
    def expert_rank(self) -> int:
        """Which part of the experts this rank holds."""
        return self.rank % self.expert_parallel

    def local_experts(self, experts: int) -> range:
        """Global indices of this rank's experts among ``experts``."""
        local = experts // self.expert_parallel
        return range(self.expert_rank * local, (self.expert_rank + 1) * local)

    def check(self, experts: int) -> None:
        """Refuse a mesh that cannot be.

        Raises:
            StageError: ``expert_parallel`` does not divide the processes or the experts.
        """
        for count, what in ((self.world, "processes"), (experts, "experts")):
            if count % self.expert_parallel:
                allowed = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
                raise StageError(
                    f"expert_parallel is {self.expert_parallel}; it must divide the number of {what}, which is "
                    f"{count}, so it can be {allowed}."
                )


def official_parameter(name: str) -> str | None:
    """A parameter's name in a model whose experts are not sharded.

    ``….experts.experts.w1`` of a sharded model is ``….experts.gate_up_proj``; ``None`` for ``w3``, which only a
    sharded model has.
    """
    owner, _, leaf = name.rpartition(".")
    if not owner.endswith(".experts.experts"):
        return name
    return f"{owner.removesuffix('.experts')}.{_STACKS[leaf]}" if leaf in _STACKS else None


def sharded_parameter(official: str) -> str:
    """The inverse of :func:`official_parameter`: the name where experts are sharded."""
    owner, _, leaf = official.rpartition(".")
    stacks = {stack: name for name, stack in _STACKS.items()}
    return f"{owner}.experts.{stacks[leaf]}" if leaf in stacks else official


def groups_fit(groups: int, world: int) -> bool:
    """Whether ``world`` processes can share out load-balance groups: several to a process or the other way round."""
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
