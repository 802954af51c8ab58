"""What DeepSpeed does not offer between a backward pass and ``engine.step()``: sums in fp32, the norm, a skipped step.

``GradientSums(engine)`` is for ZeRO-1; from then on the engine is used as ever.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor


class GradientSums:
    """A step's gradients: summed over micro-steps on each rank, reduced over ranks once a step, both in fp32.

    DeepSpeed 0.19.8 has no way to that with its ``DeepSpeedZeroOptimizer``, for which this package is written: ZeRO-2
    reduces at every micro-step; ZeRO-1 sums bf16 gradients in bf16, or, told ``grad_accum_dtype: fp32``, is replaced
    by ``BF16_Optimizer`` (other checkpoints and norms, no skipped step). So the sums lie here, one flat tensor laid out
    like each of the optimizer's flat groups of weights, and stand in for ZeRO-1's ``reduce_gradients``: one
    reduce-scatter per group gives every rank the part whose optimizer state it holds, which an all-reduce followed by
    a selection, DeepSpeed's way, does with twice the traffic. A group of experts is reduced over the ranks that hold
    the same ones. Memory: 4 bytes for each weight that the rank holds, all the time, and for each of its part from
    the reduction to the optimizer's step.

    Args:
        engine: DeepSpeed's, with ZeRO-1.
    """

    def __init__(self, engine: Any) -> None:
        self._zero = zero = engine.optimizer
        self._sums = [torch.zeros_like(weights, dtype=torch.float32) for weights in zero.bit16_groups_flat]
        for sums, weights, parameters in zip(
            self._sums, zero.bit16_groups_flat, zero.bit16_groups, strict=True
        ):
            for parameter in parameters:
                start = parameter.storage_offset() - weights.storage_offset()
                place = sums[start : start + parameter.numel()].view_as(parameter)
                parameter.register_post_accumulate_grad_hook(partial(self._add, place))
        zero.reduce_gradients = self._reduce

    @staticmethod
    def _add(place: Tensor, parameter: Tensor) -> None:
        """Move a gradient of one micro-step into its sum."""
        assert parameter.grad is not None
        with torch.no_grad():
            place.add_(parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def _reduce(self, pipeline_parallel: bool = False) -> None:
        """Hand the optimizer its part of the ranks' mean gradients; a collective, after a step's last backward pass."""
        from deepspeed import comm  # type: ignore[import-untyped]
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup  # type: ignore[import-untyped]

        zero, world = self._zero, comm.get_world_size(self._zero.dp_process_group)
        for number, sums in enumerate(self._sums):
            mine = sums.new_empty(zero.partition_size[number])
            comm.reduce_scatter_fn(mine, sums, group=zero.real_dp_process_group[number])
            # By all ranks also for experts: the all-to-alls' backward passes have summed over those that share a copy.
            mine.div_(world)
            places = (p._hp_mapping.hp_fragment_address for p in zero.params_in_partition[number])
            pieces = [mine.narrow(0, place.start, place.numel) for place in places]
            zero.averaged_gradients[number] = GradPartitionBufferGroup(pieces, mine)
            sums.zero_()


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
