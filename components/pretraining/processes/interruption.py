"""Graceful shutdown on signals: ``with Interruption.watching() as interruption``.

SIGTERM (a scheduler's warning, a user's ``kill``) and SIGINT only set a flag; the loop saves and stops between two
steps. Slurm can send its warning early with ``--signal=TERM@120``.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from components.pretraining.processes.ranks import Ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether and by what this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self.name = "a signal to another process of the run"

    @classmethod
    @contextmanager
    def watching(cls) -> Iterator[Interruption]:
        """Listen for the signals; outside the main thread, where Python allows no handlers, never asks to stop."""
        interruption = cls()
        if threading.current_thread() is not threading.main_thread():
            yield interruption
            return
        previous = {number: signal.signal(number, interruption._handle) for number in _SIGNALS}
        try:
            yield interruption
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.name = signal.Signals(number).name

    def requested_on_any(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop: an all-reduce, so that all ranks stop after the same step."""
        if ranks.world == 1:
            return self.requested
        flag = torch.tensor([int(self.requested)], device=ranks.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
