"""The picture of an SFT run: ``draw(path, metrics_path, heldout)``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from components.measures.figures import save_figure


def draw(path: Path, metrics_path: Path, heldout: Mapping[str, Any]) -> None:
    """Write ``sft.png``: the loss by step beside the tasks' scores before and after."""
    steps, losses = [], []
    for line in metrics_path.read_text().splitlines():
        row = json.loads(line)
        if "train/loss" in row["metrics"]:
            steps.append(row["step"])
            losses.append(row["metrics"]["train/loss"])
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, losses, label="training")
    for name, style in (("base", ":"), ("sft", "--")):
        loss = heldout["sft_loss"][name]["nats_per_token"]
        left.axhline(loss, linestyle=style, color="grey", label=f"held out, {name}: {loss:.2f}")
    left.set(xlabel="step", ylabel="nats per assistant token", title="SFT loss")
    left.legend()
    tasks = list(heldout["tasks"])
    for offset, name in ((-0.2, "base"), (0.2, "sft")):
        rows = [heldout["tasks"][task][name] for task in tasks]
        scores = [row["score"] for row in rows]
        errors = [
            [max(0.0, row["score"] - row["ci_low"]) for row in rows],
            [max(0.0, row["ci_high"] - row["score"]) for row in rows],
        ]
        places = [index + offset for index in range(len(tasks))]
        right.bar(places, scores, 0.4, yerr=errors, capsize=4, label=name)
    for index, task in enumerate(tasks):
        chance = heldout["tasks"][task]["base"]["chance"]
        right.plot([index - 0.4, index + 0.4], [chance, chance], color="black", linestyle=":")
    right.set(xticks=range(len(tasks)), xticklabels=tasks, ylim=(0, 1), ylabel="share right (95 % interval)")
    right.set_title("templated tasks, development items (dotted: chance)")
    right.legend()
    save_figure(figure, path)
