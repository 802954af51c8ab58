from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows import runner as runner_module
from flows.runner import Runner
from flows.stages import Stage

TOY = "tests.flows.toy_stages"
TOY_STAGES = (
    Stage("first", TOY),
    Stage("second", TOY, {"first": "first"}),
    Stage("aside", TOY),
    Stage("third", TOY, {"second": "second", "aside": "aside"}),
)


@dataclass
class ToyRecipe:
    """Stands for a recipe where only the runner is under test."""

    name: str = "toy"
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def part(self, stage: str) -> dict[str, Any]:
        return {"value": 1, **self.parts.get(stage, {})}

    def placement(self, stage: str) -> frozenset[str]:
        return frozenset({"where"})


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes runners over the toy stages; what they said is in ``runner.said``."""
    named = {stage.name: stage for stage in TOY_STAGES}
    monkeypatch.setattr(runner_module, "stage_named", named.__getitem__)

    def make(**parts: dict[str, Any]) -> Runner:
        said: list[str] = []
        runner = Runner(ToyRecipe(parts=parts), tmp_path / "runs", say=said.append)
        runner.said = said
        return runner

    return make
