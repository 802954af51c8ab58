"""What DeepSpeed does not offer between the last backward pass and ``engine.step()``: the norm, and taking no step."""

from __future__ import annotations

import logging
from typing import Any


def averaged_grad_norm(engine: Any) -> float:
    """Global norm of the step's averaged gradients, between the last backward pass and ``engine.step()``.

    All processes take part and get the same value; ``inf`` when a gradient is not finite. DeepSpeed's ZeRO stages 1
    and 2 hold each process's part of the averages by then, those of expert groups included. DeepSpeed computes the
    norm again when it clips: it has no call that takes one, and in bf16 it would apply one that is not finite.
    """
    return float(engine.optimizer.scaled_global_norm()) / float(engine.optimizer.loss_scale)


def drop_step(engine: Any) -> None:
    """Take no step: drop the gradients and leave weights, moments and the optimizer's step count as they are.

    Goes DeepSpeed's own way for an overflow of fp16 gradients, which frees all of its buffers in both ZeRO stages.
    """
    from deepspeed.utils import logger  # type: ignore[import-untyped]

    optimizer = engine.optimizer
    checks, level = optimizer.check_grad_overflow, logger.level

    def refuse(partition_gradients: bool = True) -> None:
        optimizer.overflow = True

    optimizer.check_grad_overflow, optimizer.check_overflow = True, refuse
    logger.setLevel(logging.ERROR)  # it would warn of gradients that are not finite, which a spike's are
    try:
        engine.step()
    finally:
        logger.setLevel(level)
        optimizer.check_grad_overflow = checks
        del optimizer.check_overflow  # the class's own shows again
        optimizer.overflow = False
