"""One small run of the stage, shared by the tests that only look at its result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from components.posttraining import run
from tests.posttraining.factory import Inputs, make_inputs

CONFIG: dict[str, Any] = {
    "context": 128,
    "rows_per_step": 8,
    "rows_per_micro_batch": 8,
    "max_steps": 64,
    "epochs": 10.0,
    "peak_lr": 4e-3,
    "threads": 1,
    "task_items": 40,
    "text_tokens_per_category": 256,
    "checkpoint_every_steps": 10,
    "log_every_steps": 1,
}


@dataclass
class Finished:
    """A finished stage."""

    inputs: Inputs
    out: Path
    metrics: dict[str, float]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The stage, run once without disturbance."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("posttrain")
    inputs = make_inputs(root / "inputs")
    out = root / "out"
    return Finished(inputs, out, run(inputs.context("posttrain", out, CONFIG)))
