"""Reads the next step's batches while this step computes: ``Prefetcher(read, steps, device).take(step)``.

One step is read ahead, so at most two are in memory: the one that is trained on and the next. A step's rows are read
side by side, because a cluster's storage answers late rather than slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import torch

from components.pretraining.data.batches import MicroBatch

Groups = list[list[MicroBatch]]
_READERS = 16


class Prefetcher:
    """The micro-batches of consecutive steps.

    Args:
        read: gives a step's micro-batches by load-balance group, reading rows with the threads it is handed; the same
            for the same step, whatever was read before.
        steps: of the whole run; nothing is read beyond.
        device: where they will be used; for CUDA they arrive in pinned memory.
    """

    def __init__(self, read: Callable[[int, Executor], Groups], steps: int, device: torch.device) -> None:
        self._read, self._steps, self._device = read, steps, device
        self._loader = ThreadPoolExecutor(1, "batches", self._enter)
        self._readers = ThreadPoolExecutor(_READERS, "rows")
        self._ahead: tuple[int, Future[Groups]] | None = None

    def take(self, step: int) -> Groups:
        """The micro-batches of ``step``; reading those of the step after it begins before this returns.

        Raises:
            Exception: whatever reading this step raised, in whichever thread.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            wanted = ahead[1]
        else:  # the first step, or another than the next one
            if ahead is not None:
                ahead[1].cancel()
            wanted = self._loader.submit(self._load, step)
        if step + 1 < self._steps:
            self._ahead = step + 1, self._loader.submit(self._load, step + 1)
        return wanted.result()

    def close(self) -> None:
        """Drop what was read ahead and end the threads, waiting for the rows whose reading has begun."""
        self._ahead = None
        for pool in (self._readers, self._loader):
            pool.shutdown(wait=True, cancel_futures=True)

    def _enter(self) -> None:
        if self._device.type == "cuda":
            # A new thread's device is the first: pinning would make a context there, in every process of a node.
            torch.cuda.set_device(self._device)

    def _load(self, step: int) -> Groups:
        groups = self._read(step, self._readers)
        if self._device.type == "cuda":
            groups = [[batch.pinned() for batch in group] for group in groups]
        return groups
