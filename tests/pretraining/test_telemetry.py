"""Balance at two scopes, averages without steps, and the metrics file after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from components.pretraining.checkpoints.progress import RunRecord, align_metrics
from components.pretraining.data.batches import MicroBatch
from components.pretraining.processes.ranks import Ranks
from components.pretraining.training.telemetry import Interval, Layout, StepMeter
from model.modeling import CausalLMOutput, RouterStats


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
            load_balance_loss=torch.tensor([2.0]), router_z_loss=torch.tensor([0.5]), router_stats=stats
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


def test_an_interval_of_skipped_steps_has_no_averages() -> None:
    layout = Layout(2, 4, 2, 8)
    interval = Interval(layout)
    for _ in range(3):
        interval.skip()
    resumed = Interval(layout)
    resumed.load_state(json.loads(json.dumps(interval.to_state())))
    assert interval.drain() == resumed.drain() == {"train/skipped": 3.0}
    figures = torch.ones(layout.width, dtype=torch.float64)
    interval.skip()
    interval.add(figures, 2.0)
    mixed = interval.drain()
    assert (mixed["train/skipped"], mixed["train/grad_norm"], mixed["train/ce"]) == (1.0, 2.0, 1.0)


def test_the_metrics_file_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    def line(step: int, **metrics: float) -> str:
        return json.dumps({"step": step, "time_s": float(step), "metrics": metrics})

    def train(step: int) -> str:
        return line(step, **{"train/lr": step / 10})

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
        (3, ("train/lr", 0.3)),
        (6, ("train/lr", 0.6)),
        # Recorded and not yet logged when the crash came: written now, the end before the next start.
        (6, ("heldout/bits_per_byte/overall", 4.0)),
        (6, ("heldout_start/bits_per_byte/overall", 4.5)),
    ]
    assert rows[0]["time_s"] == 0.0 and rows[1]["time_s"] == 3.0  # old moments are kept
    align_metrics(path, 3, record)
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [0, 3]
    record.forget_after(3)
    assert sorted(record.values) == ["bigram", "stage1:start"]
