"""Gradients of many micro-steps in bf16: what the optimizer is given is their sum, and not what bf16 keeps of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from components.pretraining.config import PretrainConfig
from components.pretraining.processes.ranks import Ranks
from tests.pretraining.children import Children
from tests.pretraining.factory import CONTEXT, run_config, stage_config
from tests.pretraining.test_dropping import build
from tests.pretraining.test_resharding import fragments, together

MICRO_STEPS = 64  # a power of two: DeepSpeed divides the loss by it before the backward pass in bf16
ROWS_BT = torch.randint(0, 300, (1, CONTEXT), generator=torch.Generator().manual_seed(5))


def accumulate(values: dict[str, Any], place: Path) -> None:
    """One step of equal micro-steps; writes down this rank's part of the state."""
    config = PretrainConfig.model_validate(values)
    engine, ranks = build(config)
    for number in range(MICRO_STEPS):
        engine.backward(engine(input_ids=ROWS_BT, labels=ROWS_BT, use_cache=False).loss)
        if number < MICRO_STEPS - 1:
            engine.step()
    engine.step()
    torch.save(fragments(engine), place / f"rank-{ranks.rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # skip the tear-down of gloo, which waits for its peers


def gradient_of_one(config: PretrainConfig) -> dict[str, torch.Tensor]:
    """The mean of equal gradients is one of them: forward and backward in bf16, plain torch."""
    from components.pretraining.architecture import model_config
    from components.pretraining.deepspeed.initial_model import initial_model
    from model import LoadBalance

    model = initial_model(config, model_config(config), Ranks(precision="bf16"))
    model.balance = LoadBalance()
    model.train()(input_ids=ROWS_BT, labels=ROWS_BT, use_cache=False).loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("zero_stage", "world", "expert_parallel"),
    [
        (1, 1, 1),
        (2, 1, 1),
        *(pytest.param(stage, 2, size, marks=pytest.mark.campaign) for stage in (1, 2) for size in (1, 2)),
    ],
)
def test_the_optimizer_gets_the_sum_of_all_micro_steps(
    tmp_path: Path, children: Children, zero_stage: int, world: int, expert_parallel: int
) -> None:
    batch = MICRO_STEPS * world
    stage = stage_config(sequences_per_step=batch, tokens=20 * batch * CONTEXT)
    values = run_config(
        stages=[stage] * 3,
        precision="bf16",
        zero_stage=zero_stage,
        sequences_per_micro_batch=1,
        expert_parallel=expert_parallel,
    )
    children.call_ranks(world, accumulate, values, tmp_path)
    config = PretrainConfig.model_validate(values)
    gradients = gradient_of_one(config)
    moments = {name: entry["exp_avg"] for name, entry in together(tmp_path).items()}
    assert moments.keys() == gradients.keys()
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    clip = min(1.0, config.optimizer.clip_norm / norm)
    assert clip < 1.0
    wanted = (
        torch.cat([g.flatten() for _, g in sorted(gradients.items())]) * clip * (1 - config.optimizer.beta1)
    )
    found = torch.cat([m.flatten() for _, m in sorted(moments.items())])
    error = float((found - wanted).norm() / wanted.norm())
    assert error < 1e-3  # 0.03 when the sum is kept in bf16
