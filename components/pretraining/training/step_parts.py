"""Names for what a training step spends its time on: ``with part("optimizer"): …`` shows in profiles and ledgers."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function

from components.pretraining.processes.heartbeat import beat_on

PARTS = (
    "attention",
    "router and dispatch",
    "expert products",
    "head and loss",
    "optimizer",
    "data",
    "communication",
    "rest",
)
PREFIX = "part:"


@contextmanager
def part(name: str) -> Iterator[None]:
    """What runs within counts as part ``name`` of :data:`PARTS`, unless a module in it says otherwise."""
    beat_on(f"{name}")
    with record_function(PREFIX + name):
        yield
    beat_on("the step")
