"""The picture of a sweep: ``draw(path, scored, chosen)``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from components.artifacts import write_atomically
from components.merging.sweep import Scored


def draw(path: Path, scored: Sequence[Scored], chosen: int) -> None:
    """Write ``sweep.png``: mean task score against held-out bits per byte, one labelled point per candidate."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, candidate in enumerate(scored):
        x, y = candidate.bits_per_byte["overall"], candidate.task_score
        picked = index == chosen
        axes.scatter(x, y, s=120 if picked else 40, color="tab:red" if picked else "tab:blue", zorder=3)
        label = candidate.label + (" (chosen)" if picked else "")
        axes.annotate(label, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="held-out bits per byte (lower is better)",
        ylabel="mean score of the templated tasks (dev)",
        title="Linear merging: every candidate of the sweep",
    )
    axes.margins(x=0.2, y=0.12)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
