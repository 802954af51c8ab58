"""Dead experts: when the alarm is raised, once, and by a resumed run alike; a run that loses experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.pretraining.config import PretrainConfig
from components.pretraining.training.dead_experts import DeadExperts
from tests.pretraining.children import Children
from tests.pretraining.factory import MODEL, run_config
from tests.pretraining.test_training import lines

EVEN = [1.0, 1.0, 1.0, 1.0]


def loads(*layers: list[float]) -> torch.Tensor:
    return torch.tensor(layers, dtype=torch.float64)


def test_the_alarm_names_layer_and_expert_after_so_many_intervals_in_a_row() -> None:
    watch = DeadExperts(0.1, 3)
    low, lowest = loads(EVEN, [0.05, 1.9, 1.0, 1.05]), loads(EVEN, [0.05, 1.95, 2.0, 0.0])
    assert [watch.watch(low, 10), watch.watch(low, 20)] == [None, None]
    assert watch.watch(loads(EVEN, EVEN), 30) is None  # alive again: counted from the start
    assert [watch.watch(low, step) for step in (40, 50)] == [None, None]
    resumed = DeadExperts(0.1, 3)
    resumed.load_state(json.loads(json.dumps(watch.to_state())))
    for one in (watch, resumed):
        alarm = one.watch(lowest, 60)
        assert alarm is not None and alarm.startswith("Step 60: dead experts, below 0.1 of ")
        assert "for 3 logged intervals: layer 1: 0." in alarm
        assert one.watch(lowest, 70) is None  # said once; expert 3 is dead for two intervals
        later = one.watch(lowest, 80)
        assert later is not None and "layer 1: 3." in later
        assert one.alarms == [alarm, later]
    assert watch.to_state() == resumed.to_state()


def test_a_load_at_the_share_is_alive_and_none_is_dead() -> None:
    watch = DeadExperts(0.1, 1)
    assert watch.watch(loads([0.1, 1.9, 1.0, 1.0]), 5) is None
    assert watch.metrics(loads(EVEN, [0.0, 0.0, 2.0, 2.0])) == {
        "router/dead": 0.25, "router/dead/layer00": 0.0, "router/dead/layer01": 0.5,
    }  # fmt: skip
    fresh = DeadExperts(0.1, 1)
    fresh.load_state(
        json.loads(json.dumps(DeadExperts(0.1, 1).to_state()))
    )  # a checkpoint before the first interval
    assert fresh.watch(loads([0.0, 2.0, 1.0, 1.0]), 5) is not None


@pytest.fixture(scope="module")
def unbalanced() -> dict[str, Any]:
    """More experts than the text has uses for, and nothing that balances them."""
    return run_config(
        model={"preset": "nano", "overrides": {**MODEL, "moe_num_primary_experts": 16}},
        load_balance_coef=0.0,
        router_z_coef=0.0,
        dead_expert_share=0.5,
        dead_expert_intervals=2,
    )


def test_a_run_logs_its_load_and_notes_dead_experts(
    tmp_path: Path, tokens: Path, children: Children, unbalanced: dict[str, Any]
) -> None:
    answer = children.run(tokens, tmp_path / "out", unbalanced)
    rows = [row["metrics"] for row in lines(tmp_path / "out") if "train/ce" in row["metrics"]]
    for row in rows:
        for layer in ("layer00", "layer01"):
            low, high = row[f"router/load_min/{layer}"], row[f"router/load_max/{layer}"]
            assert 0 <= low < 1 < high <= 8 and 0 < row[f"router/load_entropy/{layer}"] < 1
            assert (row[f"router/dead/{layer}"] > 0) == (low < 0.5)
        assert row["router/load_min"] == min(row[f"router/load_min/layer{layer:02d}"] for layer in range(2))
        for loss in ("load_balance", "router_z"):
            by_layer = [row[f"train/{loss}/layer{layer:02d}"] for layer in range(2)]
            assert row[f"train/{loss}"] == pytest.approx(sum(by_layer) / 2) and by_layer[0] != by_layer[1]
    assert {
        "dead_expert_share",
        "dead_expert_intervals",
    } <= PretrainConfig.PLACEMENT  # no part of what a run is
    alarms = [note for note in answer["notes"] if "dead experts" in note]
    assert alarms and "below 0.5 of their layer's mean load for 2 logged intervals: layer " in alarms[0]
