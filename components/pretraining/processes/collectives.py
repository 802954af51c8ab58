"""Collectives of Python objects outside training steps: ``Collectives(ranks).broadcast(value)``.

Over gloo and with a timeout of hours, also where training uses NCCL: a rank may hash or convert hundreds of gigabytes
while the others wait, and NCCL's watchdog ends a run after ten minutes of that.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from components.pretraining.processes.ranks import Ranks

_TIMEOUT = timedelta(hours=6)
_Value = TypeVar("_Value")


class Collectives:
    """A process group of all ranks; every rank makes the same calls in the same order.

    A group belongs to one thread: a background thread needs one of its own, or its calls would interleave.
    """

    def __init__(self, ranks: Ranks) -> None:
        """A collective: all ranks create their groups in the same order."""
        self._ranks = ranks
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if ranks.world > 1 else None

    def broadcast(self, value: _Value) -> _Value:
        """The first rank's value, on every rank."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: _Value) -> list[_Value]:
        """All-gather: every rank's value in the order of ranks, on every rank."""
        if self._group is None:
            return [value]
        values: list[_Value] = [value] * self._ranks.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self._group is not None:
            dist.barrier(group=self._group)
