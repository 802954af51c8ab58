"""Stages that are killed on purpose."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from components.artifacts import StageContext
from tests.freezing import await_frozen, freeze_when


def _child(run: Callable[[StageContext], Any], context: StageContext, condition: Callable[[], bool]) -> None:
    torch.set_num_threads(1)
    # Not the lock that a forked process shares with its parent: it may be killed while it holds it.
    tqdm.set_lock(threading.RLock())
    look = freeze_when(condition)
    log_metrics = context.log_metrics

    def log_and_look(*arguments: Any, **named: Any) -> None:
        log_metrics(*arguments, **named)
        look()

    context.log_metrics = log_and_look  # type: ignore[method-assign]
    run(context)


def kill_when(
    run: Callable[[StageContext], Any], context: StageContext, condition: Callable[[], bool]
) -> None:
    """Run the stage in a process of its own, which stops as soon as the condition holds, and SIGKILL it there."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(run, context, condition))
    process.start()
    assert process.pid is not None
    try:
        await_frozen(process.pid, process.is_alive)
    finally:
        process.kill()
        process.join()
