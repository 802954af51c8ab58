"""The picture of a sweep: ``draw(path, scored, chosen)``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from components.measures.figures import save_figure
from components.merging.sweep import Scored


def draw(path: Path, scored: Sequence[Scored], chosen: int) -> None:
    """Write ``sweep.png``: mean task score against held-out bits per byte, one labelled point per candidate."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
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
    save_figure(figure, path)
