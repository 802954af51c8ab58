"""Where a training step's time goes: ``with StepProfile(model) as profile: step()``, then ``profile.split_s()``.

Every operator that torch's profiler saw is put down to a part: forward operators by the module that they ran in,
backward operators by the forward operator that created them (same sequence number). Times are self times, so parts add
up; on GPUs they are kernels' times, on CPUs operators'.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from components.pretraining.training.step_parts import PARTS, PREFIX

if TYPE_CHECKING:
    pass

# Operators inside the expert layer that are its matrix products, on CPUs and on GPUs, forward and backward.
_PRODUCTS = ("_ExpertLoop", "aten::_grouped_mm", "aten::mm", "aten::bmm")
_COMMUNICATION = ("nccl:", "gloo:", "c10d::")


class StepProfile(AbstractContextManager["StepProfile"]):
    """Profiles what runs within.

    Args:
        model: the model whose modules are told apart; its forward passes get hooks for the time of the profile.
    """

    def __init__(self, model: nn.Module) -> None:
        from model.attention import Attention
        from model.experts import Experts, Router

        self._cuda = torch.cuda.is_available()
        kinds: tuple[tuple[type[nn.Module] | str, str], ...] = (
            (Attention, "attention"),
            (Router, "router and dispatch"),
            (Experts, "router and dispatch"),
            ("lm_head", "head and loss"),
        )
        self._hooked: list[tuple[nn.Module, str]] = []
        for name, module in model.named_modules():
            for kind, label in kinds:
                matches = name.endswith(kind) if isinstance(kind, str) else isinstance(module, kind)
                if matches or (kind is Experts and name.endswith("block_sparse_moe.experts")):
                    self._hooked.append((module, label))
                    break
        self._handles: list[Any] = []
        self._open: list[record_function] = []
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=activities)

    def _enter_module(self, label: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            opened = record_function(PREFIX + label)
            opened.__enter__()
            self._open.append(opened)

        return hook

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._open.pop().__exit__(None, None, None)

    def __enter__(self) -> StepProfile:
        for module, label in self._hooked:
            self._handles.append(module.register_forward_pre_hook(self._enter_module(label)))
            self._handles.append(module.register_forward_hook(self._leave_module))
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._profile.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def split_s(self) -> dict[str, float]:
        """Seconds by part of :data:`PARTS`, over everything that was profiled."""
        return split_events(self._profile.events() or [], self._cuda)


def _enclosing_part(event: FunctionEvent) -> str | None:
    at: FunctionEvent | None = event
    while at is not None:
        if at.name.startswith(PREFIX):
            return at.name.removeprefix(PREFIX)
        at = at.cpu_parent
    return None


def _backward_root(event: FunctionEvent) -> FunctionEvent | None:
    """The outermost event of the autograd engine around ``event``."""
    found: FunctionEvent | None = None
    at: FunctionEvent | None = event
    while at is not None:
        if at.name.startswith("autograd::engine::evaluate_function"):
            found = at
        at = at.cpu_parent
    return found


def _is_product(event: FunctionEvent) -> bool:
    at: FunctionEvent | None = event
    while at is not None and not at.name.startswith(PREFIX):
        if at.name.startswith(_PRODUCTS):
            return True
        at = at.cpu_parent
    return False


def split_events(events: Iterable[FunctionEvent], cuda: bool) -> dict[str, float]:
    """Self times by part in seconds; see the module's first lines for the rules."""
    events = list(events)
    part_of_sequence: dict[int, str] = {}
    for event in events:
        # A view of the same number made outside any part must not hide the operator itself: the first part wins.
        if event.sequence_nr >= 0 and _backward_root(event) is None:
            label = _enclosing_part(event)
            if label is not None:
                part_of_sequence.setdefault(event.sequence_nr, label)
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:
        own_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own_us <= 0 or (
            cuda and event.name.startswith(PREFIX)
        ):  # on GPUs a range repeats its kernels' time
            continue
        label = _enclosing_part(event)
        if label is None:
            root = _backward_root(event)
            label = part_of_sequence.get(root.sequence_nr, "rest") if root is not None else "rest"
        if label == "router and dispatch" and _is_product(event):
            label = "expert products"
        if event.name.startswith(_COMMUNICATION):
            label = "communication"
        seconds[label] += own_us / 1e6
    return seconds
