"""The profile's split: every operator once, backward work with the module that caused it."""

from __future__ import annotations

import pytest
import torch

from components.pretraining.architecture import model_config
from components.pretraining.config import PretrainConfig
from components.pretraining.deepspeed.initial_model import initial_model
from components.pretraining.studies.profiling import StepProfile
from components.pretraining.training.step_parts import PARTS, part
from tests.pretraining.factory import CONTEXT, run_config


def test_parts_add_up_and_follow_the_modules() -> None:
    config = PretrainConfig.model_validate(run_config())
    model = initial_model(config, model_config(config)).train()
    ids = torch.randint(0, 384, (4, 4 * CONTEXT))

    def step() -> None:
        logits = model(ids, use_cache=False).logits
        with part("head and loss"):
            loss = logits.float().logsumexp(-1).mean()
        loss.backward()
        with part("optimizer"):
            for parameter in model.parameters():
                parameter.grad = None

    step()
    with StepProfile(model) as profile:
        step()
    split = profile.split_s()
    assert tuple(split) == PARTS
    for name in ("attention", "router and dispatch", "expert products", "head and loss", "optimizer", "rest"):
        assert split[name] > 0, name
    assert split["data"] == split["communication"] == 0
    events = profile._profile.events()
    assert sum(split.values()) == pytest.approx(sum(e.self_cpu_time_total for e in events) / 1e6, rel=1e-3)
    # Hooks are gone: a second profile counts as much work, not twice.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_backward_work_counts_for_its_module() -> None:
    """The same forward with and without a backward pass: attention and experts both gain."""
    config = PretrainConfig.model_validate(run_config())
    model = initial_model(config, model_config(config)).train()
    ids = torch.randint(0, 384, (2, CONTEXT))
    names = {}
    for backward in (False, True):
        with StepProfile(model) as profile:
            out = model(ids, use_cache=False).logits.sum()
            if backward:
                out.backward()
        split = profile.split_s()
        names[backward] = {e.name for e in profile._profile.events()}
        if backward:
            assert split["rest"] < sum(split.values()) / 2
    assert any("_ExpertLoopBackward" in name for name in names[True] - names[False])
