"""Pictures of a run: ``draw_loss(metrics_path, curriculum, out)`` and ``draw_bits_per_byte(heldout, names, out)``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from components.corpus.categories import CATEGORIES
from components.measures.figures import COLOURS, save_figure, tidy
from components.pretraining.checkpoints.progress import LOSS_KEY, TRAIN_KEY
from components.pretraining.data.curriculum import Curriculum


def draw_loss(metrics_path: Path, curriculum: Curriculum, out: Path) -> None:
    """Training loss, in total and by category, with the training stages' boundaries, and the learning rate below."""
    lines = [json.loads(text) for text in metrics_path.read_text().splitlines()]
    training = [line for line in lines if TRAIN_KEY in line["metrics"]]
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for colour, name in zip(COLOURS, CATEGORIES, strict=True):
        key = f"train/ce/{name}"
        points = [(line["step"], line["metrics"][key]) for line in training if key in line["metrics"]]
        if points:
            upper.plot(*zip(*points, strict=True), color=colour, linewidth=0.9, alpha=0.8, label=name)
    steps = [line["step"] for line in training]
    losses = [line["metrics"].get(LOSS_KEY, math.nan) for line in training]
    upper.plot(steps, losses, color="black", linewidth=1.6, label="all")
    upper.set_ylabel("training loss (nats per token)")
    upper.legend(ncols=4, frameon=False, fontsize=8)
    lower.plot(steps, [line["metrics"]["train/lr"] for line in training], color="black", linewidth=1.2)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("optimizer step")
    for axes in (upper, lower):
        tidy(axes)
        for span in curriculum.spans[1:]:
            axes.axvline(span.start, color="grey", linewidth=0.8, linestyle="--")
    for span in curriculum.spans:
        label = f"{span.name}\ncontext {span.stage.context}, RoPE base {span.stage.rope_theta:.2g}"
        upper.annotate(
            label,
            ((span.start + span.end) / 2, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            fontsize=6.5,
        )
    save_figure(figure, out)


def draw_bits_per_byte(heldout: Mapping[str, Any], names: Sequence[str], out: Path) -> None:
    """Held-out bits per byte by category after each training stage, beside the bigram baseline."""
    columns = [name for name in (*CATEGORIES, "overall") if name in heldout["bigram"]]
    series = [*((name, heldout[name]) for name in names), ("bigram baseline", heldout["bigram"])]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series):
        colour = "#999999" if label.startswith("bigram") else COLOURS[number]
        places = [i + (number - (len(series) - 1) / 2) * width for i in range(len(columns))]
        bars = axes.bar(places, [values[c] for c in columns], width * 0.92, label=label, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=6.5, padding=1)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("held-out bits per byte (lower is better)")
    axes.legend(ncols=4, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 1.12))
    tidy(axes)
    save_figure(figure, out)
