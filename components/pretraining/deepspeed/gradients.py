"""What DeepSpeed does not offer between the last backward pass and ``engine.step()``: the norm, and a skipped step."""

from __future__ import annotations

import logging
from typing import Any


def averaged_grad_norm(engine: Any) -> float:
    """Global norm of the step's averaged gradients, between the last backward pass and ``engine.step()``.

    A collective: every rank gets the same value, ``inf`` when a gradient is non-finite. DeepSpeed's ZeRO stages 1 and
    2 hold each rank's partition of the averages by then, those of expert groups included. DeepSpeed computes the norm
    again when it clips: it has no call that takes one, and in bf16 it would apply a non-finite one.
    """
    return float(engine.optimizer.scaled_global_norm()) / float(engine.optimizer.loss_scale)


def drop_step(engine: Any) -> None:
    """Skip the step: drop the gradients and leave weights, moments and the optimizer's step count as they are.

    Takes DeepSpeed's path for an overflow of fp16 gradients, which frees all of its buffers in both ZeRO stages.
    """
    from deepspeed.utils import logger  # type: ignore[import-untyped]

    optimizer = engine.optimizer
    checks, level = optimizer.check_grad_overflow, logger.level

    def refuse(partition_gradients: bool = True) -> None:
        optimizer.overflow = True

    optimizer.check_grad_overflow, optimizer.check_overflow = True, refuse
    logger.setLevel(logging.ERROR)  # it would warn of non-finite gradients, which a spike's are
    try:
        engine.step()
    finally:
        logger.setLevel(level)
        optimizer.check_grad_overflow = checks
        del optimizer.check_overflow  # so that the class's method is seen again
        optimizer.overflow = False
