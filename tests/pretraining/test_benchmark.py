"""The training benchmark: both loops train the same model, and forced routing is balanced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.pretraining.presets import PRESETS, benchmark_config
from components.pretraining.studies.benchmark import table
from components.pretraining.training.step_parts import PARTS
from tests.pretraining.children import Children


def small() -> Any:
    config = benchmark_config("nano", 8, 32, 2, 2, 1, "cpu", 1)
    return config.model_copy(update={"precision": "fp32"})


def measure_small(answer: Path) -> None:
    """In a process of its own: what both loops lose at the first steps, and one measurement."""
    from components.pretraining.studies.benchmark import Ours, PlainLoop, measure

    config = small()
    ours = Ours(config)
    plain = PlainLoop(config, ours)
    losses: dict[str, Any] = {
        name: [loop.run(step) for step in range(3)] for name, loop in (("ours", ours), ("plain", plain))
    }
    losses["again"] = ours.run(0)
    result = measure(config, "balanced", rounds=1, steps=1, peer=True)
    answer.write_text(json.dumps({"losses": losses, "result": result}))


@pytest.mark.campaign
def test_both_loops_train_the_same_model(tmp_path: Path, children: Children) -> None:
    children.call_ranks(1, measure_small, tmp_path / "answer.json")
    answer = json.loads((tmp_path / "answer.json").read_text())
    # Ours counts a document's first word as learnt from the one before; the plain loop leaves it out.
    assert answer["losses"]["ours"] == pytest.approx(answer["losses"]["plain"], rel=5e-3)
    again = answer["losses"]["again"]
    assert again < answer["losses"]["ours"][0] - 0.05  # the optimizer acted on the first batch
    result = answer["result"]
    assert result["ratio"]["n"] == result["ours"]["n"] == 1 and result["tokens_per_step"] == 2 * 2 * 32
    assert tuple(result["split_s"]) == PARTS and result["split_s"]["expert products"] > 0
    text = table([result], {"hardware": "a machine", "versions": "torch 0"}, peak_tflops=1.0)
    for words in ("a machine", "balanced routing, fp32, 128 tokens a step", "ratio", "expert products"):
        assert words in text


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_recipe_can_be_cut_down(preset: str) -> None:
    config = benchmark_config(preset, 5, 0, 0, 1, 4, "cpu", 0)
    assert config.total_steps == 15 and config.processes == config.expert_parallel == 1
    assert config.model.overrides["num_hidden_layers"] == 4


def test_forced_routing_is_balanced() -> None:
    import torch

    from components.pretraining.studies.benchmark import _balanced
    from model.experts import Routing

    logits_TE = torch.randn(24, 8)
    weights_TK, experts_TK = torch.topk(logits_TE.softmax(-1), 2)
    forced = _balanced(None, None, Routing(logits_TE, weights_TK, experts_TK))
    assert forced.experts_TK.flatten().bincount(minlength=8).tolist() == [6] * 8
    assert forced.weights_TK.sum(dim=1) == pytest.approx(torch.ones(24))
    assert all(len(set(row)) == 2 for row in forced.experts_TK.tolist())
