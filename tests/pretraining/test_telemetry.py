"""The loss guard, balance at two scopes, and the metrics file after a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from components.artifacts import StageError
from components.pretraining.batches import MicroBatch
from components.pretraining.engine import Ranks
from components.pretraining.progress import RunRecord, align_metrics
from components.pretraining.telemetry import (
    Interval,
    Layout,
    LossGuard,
    StepMeter,
)
from model.modeling import CausalLMOutput, RouterStats


def calm_guard(steps: int) -> LossGuard:
    guard = LossGuard(1.5)
    for step in range(steps):
        guard.check(step, 2.0, 1.0, "")
        guard.accept(2.0)
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, None, "the loss is inf"),
        (-math.inf, None, "the loss is -inf"),
        (2.0, math.nan, "the gradient's norm is nan"),
        (2.0, math.inf, "the gradient's norm is inf"),
    ],
)
def test_values_that_are_not_finite(loss: float, norm: float | None, words: str) -> None:
    for guard in (calm_guard(0), calm_guard(64)):
        with pytest.raises(StageError) as caught:
            guard.check(41, loss, norm, "maths@128, code@7")
        message = str(caught.value)
        assert f"step 41: {words}." in message and message.endswith("maths@128, code@7")


def test_spikes_are_judged_by_the_recent_median() -> None:
    with pytest.raises(
        StageError, match=r"step 7: the loss jumped to 3\.001, more than 1\.5 times .* of 2\."
    ):
        calm_guard(32).check(7, 3.001, None, "")
    calm_guard(32).check(7, 3.0, None, "")  # at the ratio: allowed
    calm_guard(31).check(7, 1e9, None, "")  # too few losses to judge
    guard = calm_guard(64)
    guard.accept(100.0)  # one outlier does not move the median
    with pytest.raises(StageError):
        guard.check(66, 3.001, None, "")
    for _ in range(200):
        guard.accept(10.0)
    guard.check(300, 14.9, None, "")
    assert len(guard.recent) == 64  # what a checkpoint holds stays small
    resumed = LossGuard(1.5)
    resumed.load(guard.recent)
    with pytest.raises(StageError):
        resumed.check(300, 15.1, None, "")


def test_balance_at_global_and_at_group_scope() -> None:
    """Two groups that each use one half of the experts: balanced globally, as unbalanced as can be in a group."""
    layout = Layout(layers=1, experts=4, top_k=1, expert_hidden=8)
    meter = StepMeter(layout, Ranks(0, 1, torch.device("cpu")))
    meter.reset()
    batch = MicroBatch(*(torch.zeros(1, 9, dtype=torch.int64),) * 3, torch.zeros(1, dtype=torch.int64))
    for half in ((4, 4, 0, 0), (0, 0, 4, 4)):
        counts_LE = torch.tensor([half])
        stats = RouterStats(
            expert_counts=counts_LE,
            active_neurons=torch.tensor([16]),
            mean_scores=counts_LE / 8,
            tokens=8,
        )
        out = CausalLMOutput(
            load_balance_loss=torch.tensor(2.0), router_z_loss=torch.tensor(0.5), router_stats=stats
        )
        meter.add(batch, torch.ones(1, 8), torch.tensor(1.0), out, torch.zeros(1))
        meter.add_group(counts_LE)
    interval = Interval(layout)
    interval.add(meter.pooled(), grad_norm=3.0)
    resumed = Interval(layout)
    resumed.load_state(json.loads(json.dumps(interval.to_state())))
    for one in (interval, resumed):
        metrics = one.drain()
        assert metrics["train/load_balance"] == 2.0 and metrics["train/load_balance_global"] == 1.0
        assert metrics["router/load_max"] == 1.0 and metrics["router/load_max_group"] == 2.0
        assert metrics["experts/sparsity"] == 0.75 and metrics["train/grad_norm"] == 3.0


def test_the_metrics_file_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    def line(step: int, **metrics: float) -> str:
        return json.dumps({"step": step, "time_s": float(step), "metrics": metrics})

    def train(step: int) -> str:
        return line(step, **{"train/ce": step / 10})

    def entry(step: int, value: float) -> dict[str, Any]:
        return {"step": step, "bits_per_byte": {"overall": value}}

    record = RunRecord(tmp_path)
    for name, value in (
        ("stage1:start", entry(0, 5.0)), ("bigram", {}), ("stage1:end", entry(6, 4.0)), ("stage2:start", entry(6, 4.5)),
    ):  # fmt: skip
        record.put(name, value)
    start = line(0, **{"heldout_start/bits_per_byte/overall": 5.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "\n".join([start, train(3), train(6), train(6), train(9), train(7)[:20], "[]", '"x"', ""])
    )
    align_metrics(path, 6, record)
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert [(row["step"], *row["metrics"].items()) for row in rows] == [
        (0, ("heldout_start/bits_per_byte/overall", 5.0)),
        (3, ("train/ce", 0.3)),
        (6, ("train/ce", 0.6)),
        # Recorded and not yet logged when the crash came: written now, the end before the next start.
        (6, ("heldout/bits_per_byte/overall", 4.0)),
        (6, ("heldout_start/bits_per_byte/overall", 4.5)),
    ]
    assert rows[0]["time_s"] == 0.0 and rows[1]["time_s"] == 3.0  # old moments are kept
    align_metrics(path, 3, record)
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [0, 3]
    record.forget_after(3)
    assert sorted(record.values) == ["bigram", "stage1:start"]
