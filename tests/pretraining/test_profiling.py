"""The profile's split: every operator once, backward work with the module that caused it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent

from components.pretraining.architecture import model_config
from components.pretraining.config import PretrainConfig
from components.pretraining.deepspeed.initial_model import initial_model
from components.pretraining.studies.profiling import StepProfile, split_events
from components.pretraining.training.step_parts import PARTS, part
from tests.pretraining.factory import CONTEXT, run_config


@dataclass(frozen=True)
class Second:
    """An event that took a second, whatever it took: a split of these counts events instead of measuring them."""

    event: FunctionEvent
    self_cpu_time_total: float = 1e6

    def __getattr__(self, name: str) -> Any:
        return getattr(self.event, name)


def counted(profile: StepProfile, *names: str) -> Counter[str]:
    """How many events fell to each part: those whose name begins with one of ``names``, or all."""
    events = [event for event in profile._profile.events() if not names or event.name.startswith(names)]
    split = split_events(cast("list[FunctionEvent]", [Second(event) for event in events]), cuda=False)
    assert tuple(split) == PARTS and sum(split.values()) == pytest.approx(len(events))
    return Counter({name: round(seconds) for name, seconds in split.items() if seconds})


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
    profiles = []
    for _ in range(2):
        with StepProfile(model) as profile:
            step()
        profiles.append(profile)
    count = counted(profiles[0])
    assert set(count) == set(PARTS) - {"data", "communication"}
    # Hooks are gone after a profile: the second counts as much work, not twice.
    assert counted(profiles[1]) == count
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Times are those of the same events, each once.
    events = profiles[0]._profile.events()
    own_us = [event.self_cpu_time_total for event in events]
    assert sum(profiles[0].split_s().values()) == pytest.approx(sum(us for us in own_us if us > 0) / 1e6)


def test_backward_work_counts_for_its_module() -> None:
    """The same forward with and without a backward pass: attention, router, experts and head all gain."""
    config = PretrainConfig.model_validate(run_config())
    model = initial_model(config, model_config(config)).train()
    ids = torch.randint(0, 384, (2, CONTEXT))
    counts, products, names = {}, {}, {}
    for backward in (False, True):
        with StepProfile(model) as profile:
            out = model(ids, use_cache=False).logits.sum()
            if backward:
                out.backward()
        counts[backward] = counted(profile)
        products[backward] = counted(profile, "aten::mm", "aten::bmm", "aten::addmm", "_ExpertLoop")
        names[backward] = {event.name for event in profile._profile.events()}
    assert any("_ExpertLoopBackward" in name for name in names[True] - names[False])
    parts = ("attention", "router and dispatch", "expert products", "head and loss")
    for name in parts:
        assert counts[True][name] > counts[False][name] > 0, name
    # A product forward has two backward, for the gradients of its input and of its weights; none is left over.
    assert products[False]["rest"] == products[True]["rest"] == 0
    for name in ("attention", "head and loss"):
        assert products[True][name] == 3 * products[False][name] > 0, name
    assert products[True]["expert products"] > 2 * products[False]["expert products"] > 0
