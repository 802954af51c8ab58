"""Stages that are killed on purpose."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from components.artifacts import StageContext


def _child(run: Callable[[StageContext], Any], context: StageContext) -> None:
    torch.set_num_threads(1)
    # Not the lock that a forked process shares with its parent: it may be killed while it holds it.
    tqdm.set_lock(threading.RLock())
    run(context)


def kill_when(
    run: Callable[[StageContext], Any], context: StageContext, condition: Callable[[], bool]
) -> None:
    """Run the stage in a process of its own and SIGKILL it once the condition holds."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(run, context))
    process.start()
    deadline = time.monotonic() + 60
    while process.is_alive() and not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.pid is not None
    assert process.is_alive(), "the stage ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
