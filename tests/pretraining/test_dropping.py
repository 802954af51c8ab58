"""Judging gradients before the optimizer acts: the norm is DeepSpeed's own, and a dropped step leaves no trace."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from components.pretraining.config import PretrainConfig
from components.pretraining.data.accumulation import accumulation_steps
from tests.pretraining.children import Children
from tests.pretraining.factory import BATCH, CONTEXT, run_config


def build(config: PretrainConfig) -> tuple[Any, Any]:
    from components.pretraining.architecture import model_config
    from components.pretraining.deepspeed.engine import build_engine
    from components.pretraining.deepspeed.initial_model import initial_model
    from components.pretraining.processes.ranks import join_processes

    ranks = join_processes(config)
    model = initial_model(config, model_config(config), ranks)
    return build_engine(model, config, ranks), ranks


def backward(engine: Any, config: PretrainConfig, ranks: Any, step: int, factor: float = 1.0) -> None:
    """All micro-batches of a step; the last rank's last one weighs ``factor``."""
    micro = config.micro_batch(0)
    tokens_BT = torch.randint(0, 300, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(step))
    count = accumulation_steps(config, 0, ranks.world)
    for number in range(count):
        first = (number * ranks.world + ranks.rank) * micro
        rows_BT = tokens_BT[first : first + micro]
        loss = engine(input_ids=rows_BT, labels=rows_BT, use_cache=False).loss
        odd = number == count - 1 and ranks.rank == ranks.world - 1
        engine.backward(loss * factor if odd else loss)
        if number < count - 1:
            engine.step()
    engine.module.balance.reset()


def state(engine: Any) -> list[torch.Tensor]:
    """Copies of everything that a step changes."""
    optimizer = engine.optimizer
    found = [parameter.detach().clone() for parameter in engine.module.parameters()]
    for flat in optimizer.single_partition_of_fp32_groups:
        found.append(flat.detach().clone())
        found += [value.clone() for _, value in sorted(optimizer.optimizer.state[flat].items())]
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def drop_and_go_on(values: dict[str, Any]) -> None:
    from components.pretraining.deepspeed.gradients import averaged_grad_norm, drop_step

    config = PretrainConfig.model_validate(values)
    engine, ranks = build(config)
    for step in range(2):
        backward(engine, config, ranks, step)
        norm = averaged_grad_norm(engine)
        assert 0 < norm < math.inf
        engine.step()
        assert norm == float(engine.get_global_grad_norm())
    before = state(engine)
    counted = engine.global_steps
    for factor in (math.inf, math.nan, 3e38):
        backward(engine, config, ranks, 2, factor)
        norm = averaged_grad_norm(engine)
        norms = [torch.zeros(()) for _ in range(ranks.world)]
        dist.all_gather(norms, torch.tensor(norm))
        assert not any(math.isfinite(value) for value in norms), (factor, norms)
        drop_step(engine)
        assert same(state(engine), before), factor
    assert engine.global_steps == counted + 3 and not engine.optimizer.overflow
    backward(engine, config, ranks, 3)
    engine.step()
    after = state(engine)
    assert not same(after, before) and all(torch.isfinite(value).all() for value in after)

    # The same run without the three bad steps.
    clean, _ = build(config)
    for step in (0, 1, 3):
        backward(clean, config, ranks, step)
        clean.step()
    assert same(state(clean), after)
    os._exit(0)  # skip the tear-down of gloo, which waits for its peers


CASES = [(precision, stage, world) for precision in ("fp32", "bf16") for stage in (1, 2) for world in (1, 2)]
EVERY_TIME = (("fp32", 1, 1), ("bf16", 2, 2))


@pytest.mark.parametrize(
    ("precision", "zero_stage", "world"),
    [pytest.param(*case, marks=() if case in EVERY_TIME else pytest.mark.campaign) for case in CASES],
)
def test_a_dropped_step_leaves_no_trace(
    children: Children, precision: str, zero_stage: int, world: int
) -> None:
    values = run_config(precision=precision, zero_stage=zero_stage, sequences_per_micro_batch=2)
    children.call_ranks(world, drop_and_go_on, values)


def test_a_dropped_step_leaves_no_trace_in_muon(children: Children) -> None:
    optimizer = {"kind": "muon", "warmup_steps": 4}
    values = run_config(precision="bf16", zero_stage=2, sequences_per_micro_batch=2, optimizer=optimizer)
    children.call_ranks(2, drop_and_go_on, values)


@pytest.mark.campaign
@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 1), ("bf16", 2)])
def test_a_dropped_step_leaves_no_trace_in_experts_of_several_processes(
    children: Children, precision: str, zero_stage: int
) -> None:
    values = run_config(
        precision=precision, zero_stage=zero_stage, sequences_per_micro_batch=2, expert_parallel=2
    )
    children.call_ranks(2, drop_and_go_on, values)
