"""What the processes of a run tell one another outside training steps: ``Collectives(ranks).broadcast(value)``.

Over gloo and with a patience of hours, also where training uses NCCL: a process may hash or convert hundreds of
gigabytes while the others wait, and NCCL's watchdog ends a run after ten minutes of that.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from components.pretraining.processes.ranks import Ranks

_PATIENCE = timedelta(hours=6)
_Value = TypeVar("_Value")


class Collectives:
    """One channel between all processes; every process makes the same calls in the same order.

    A channel belongs to one thread: work in the background needs a channel of its own.
    """

    def __init__(self, ranks: Ranks) -> None:
        """All processes create their channels together, in the same order."""
        self._ranks = ranks
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if ranks.world > 1 else None

    def broadcast(self, value: _Value) -> _Value:
        """The first process's value, on all."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: _Value) -> list[_Value]:
        """Everyone's value in the order of the processes, on all."""
        if self._group is None:
            return [value]
        values: list[_Value] = [value] * self._ranks.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self._group is not None:
            dist.barrier(group=self._group)
