"""Steps where a batch's cut changes: the optimizer acts after the last micro-step, on the mean of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.pretraining.config import PretrainConfig
from model import SmallThinkerForCausalLM
from tests.pretraining.children import Children
from tests.pretraining.factory import CONTEXT, run_config, stage_config
from tests.pretraining.plain_loop import PlainRun, Run, plain_run, train_all
from tests.pretraining.test_training import lines

FIRST, LAST = 17, 4  # micro-steps of one process, as the 21B on 256 GPUs
MEANS = ("train/ce", "train/load_balance", "train/router_z", "train/grad_norm")


def changing(**values: Any) -> dict[str, Any]:
    """Two steps, one step and three steps: 51 micro-steps before a training stage whose steps have 4."""
    return exact([(2, FIRST, CONTEXT), (1, FIRST, CONTEXT), (3, LAST, 2 * CONTEXT)], **values)


def exact(shapes: list[tuple[int, int, int]], **values: Any) -> dict[str, Any]:
    """A run whose losses do not depend on the cut; training stages of (steps, sequences a step, context)."""
    stages = [
        stage_config(
            tokens=steps * batch * context,
            sequences_per_step=batch,
            context=context,
            rope_theta=1e5 if context == CONTEXT else 1.5e6,
        )
        for steps, batch, context in shapes
    ]
    settings: dict[str, Any] = {
        "stages": stages,
        # AdamW divides by the gradient's size: where that is near eps, rounding noise would become a step.
        "optimizer": {"peak_lr": 2e-3, "warmup_steps": 2, "clip_norm": 0.5, "eps": 1e-6},
        "sequences_per_micro_batch": 1,
        "load_balance_counts": "exact",
        "load_balance_coef": 0.5,
        "router_z_coef": 0.1,
        "log_every_steps": 1,
        "checkpoint_every_steps": 100,
        "on_spike": "skip",
    }
    return run_config(**{**settings, **values})


def exported(out: Path, stage: str) -> dict[str, torch.Tensor]:
    model = SmallThinkerForCausalLM.from_pretrained(out / stage, dtype=torch.float32)
    return dict(model.named_parameters())


def logged(out: Path) -> dict[int, dict[str, float]]:
    """Metrics by step (0-based) of the lines of training."""
    return {
        row["step"] - 1: row["metrics"]
        for row in lines(out)
        if "train/lr" in row["metrics"] and "train/ce" in row["metrics"]
    }


def assert_equals(out: Path, plain: PlainRun, tolerance: float, of_gradients: float | None = None) -> None:
    """Losses within ``tolerance``; norms and weights within ``of_gradients``, if that is another one."""
    found, of_gradients = logged(out), of_gradients or tolerance
    assert found.keys() == plain.metrics.keys()
    for step, wanted in plain.metrics.items():
        assert wanted["train/grad_norm"] > 0.5  # clipping bites
        for name, value in wanted.items():
            allowed = of_gradients if name == "train/grad_norm" else tolerance
            assert found[step][name] == pytest.approx(value, rel=allowed), (step, name)
    for stage, weights in plain.weights.items():
        for name, parameter in exported(out, stage).items():
            difference = (parameter - weights[name]).norm() / weights[name].norm()
            assert difference < of_gradients, (stage, name, float(difference))


def same_bits(one: Path, other: Path) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        first, second = (load_file(out / stage / "model.safetensors") for out in (one, other))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert lines(one) == lines(other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_change_of_micro_steps_between_training_stages(
    tmp_path: Path, tokens: Path, children: Children, precision: str
) -> None:
    config = changing(precision=precision)
    runs = [
        *(Run(f"zero-{stage}", {**config, "zero_stage": stage}) for stage in (1, 2)),
        Run("resumed", config, stop_at=4),  # in the middle of the last training stage
    ]
    children.call_ranks(1, train_all, runs, tokens, tmp_path)
    plain = plain_run(PretrainConfig.model_validate(config), tokens)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for run in runs:
        assert_equals(tmp_path / run.name, plain, tolerance)
    same_bits(tmp_path / "zero-1", tmp_path / "resumed")


CASES = [(stage, world) for stage in (1, 2) for world in (1, 2)]


@pytest.mark.parametrize(
    ("zero_stage", "world"),
    [pytest.param(*case, marks=() if case == (1, 2) else pytest.mark.campaign) for case in CASES],
)
def test_one_bad_micro_step_drops_the_step_and_nothing_else(
    tmp_path: Path, tokens: Path, children: Children, zero_stage: int, world: int
) -> None:
    """NaN on one rank, in the first, a middle or the last micro-step of a step of the last training stage."""
    config = changing(zero_stage=zero_stage)
    count = LAST // world
    runs = [Run(f"micro-{number}", config, poison=(4, number)) for number in range(count)]
    children.call_ranks(world, train_all, runs, tokens, tmp_path)
    plain = plain_run(PretrainConfig.model_validate(config), tokens, skipped=[4])
    for run in runs:
        assert_equals(tmp_path / run.name, plain, 1e-5)
        (skipped,) = json.loads((tmp_path / run.name / "skipped_steps.json").read_text())
        assert skipped["step"] == 4 and "norm is" in skipped["reason"]
        same_bits(tmp_path / runs[0].name, tmp_path / run.name)
