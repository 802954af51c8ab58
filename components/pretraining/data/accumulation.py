"""How a global batch is dealt out to ranks and micro-steps: ``BatchCut.of(config, stage=0, world=256)``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from components.artifacts import StageError
from components.pretraining.config import PretrainConfig


@dataclass(frozen=True)
class BatchCut:
    """One training stage's global batch on ``world`` ranks: every row once, and every rank as many micro-steps.

    Neighbouring ranks form teams, as many as divide both ranks and load-balance groups. A team takes its groups one
    after the other, and its ranks share each of them. All forward passes have ``micro_batch`` rows; where the rows do
    not fill them, ranks differ by one row and the rest is padding, which weighs nothing.

    Attributes:
        sequences: rows of the global batch.
        groups: load-balance groups, contiguous slices of the batch that differ by at most one row.
        world: ranks.
        teams: of neighbouring ranks.
        micro_batch: rows of a forward pass, padding included; at most what the config asks for.
        micro_steps_per_group: forward and backward passes that a rank makes for one group.
    """

    sequences: int
    groups: int
    world: int
    teams: int
    micro_batch: int
    micro_steps_per_group: int

    @classmethod
    def of(cls, config: PretrainConfig, stage: int, world: int) -> BatchCut:
        """The cut of training stage ``stage`` (0-based).

        Raises:
            StageError: there are more ranks than sequences.
        """
        sequences, groups = config.stages[stage].sequences_per_step, config.load_balance_groups
        if world > sequences:
            raise StageError(
                f"The global batch of stage{stage + 1} is {sequences} sequences and there are {world} processes; each "
                f"needs a sequence, so 1 to {sequences} are allowed. Change processes or sequences_per_step."
            )
        teams = math.gcd(groups, world)
        sharing, rows = world // teams, -(-sequences // groups)
        micro_steps = -(-rows // (sharing * config.micro_batch(stage)))
        return cls(sequences, groups, world, teams, -(-rows // (sharing * micro_steps)), micro_steps)

    @property
    def sharing(self) -> int:
        """Ranks of a team."""
        return self.world // self.teams

    @property
    def turns(self) -> int:
        """Load-balance groups that a team takes, one after the other."""
        return self.groups // self.teams

    @property
    def micro_steps(self) -> int:
        """Forward and backward passes per optimizer step of a rank."""
        return self.turns * self.micro_steps_per_group

    @property
    def computed_rows(self) -> int:
        """Rows of all forward passes of a step, padding included."""
        return self.micro_steps * self.micro_batch * self.world

    def rows(self, rank: int, turn: int, micro_step: int) -> slice:
        """The rows of the global batch in a rank's ``micro_step``-th pass for its team's ``turn``-th group.

        In micro-step a the n-th of R ranks takes rows ``[(a * R + n) * m, … + m)`` of the group, m being the
        micro-batch. What is left for the last one is shared out evenly; who gets one row more goes round from group to
        group, so that no rank ends up with two more than another.
        """
        team, place = divmod(rank, self.sharing)
        group = team * self.turns + turn
        start, stop = (number * self.sequences // self.groups for number in (group, group + 1))
        first = start + micro_step * self.sharing * self.micro_batch
        left = min(stop - first, self.sharing * self.micro_batch)
        each, more = divmod(left, self.sharing)
        place = (
            (place - (start - team * self.turns * self.sequences // self.groups)) % self.sharing
            if more
            else place
        )
        begin = first + place * each + min(place, more)
        return slice(begin, begin + each + (place < more))


def accumulation_steps(config: PretrainConfig, stage: int, world: int) -> int:
    """Micro-steps per optimizer step of one rank.

    Raises:
        StageError: there are more ranks than sequences.
    """
    return BatchCut.of(config, stage, world).micro_steps
