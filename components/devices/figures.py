"""The device table as a picture: speed of each file, and what its quantisation costs in perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from components.measures.figures import save_figure

_COLOURS = {"f32": "#94a3b8", "f16": "#3b82a0", "q4_0": "#0f766e"}
_GREY = "#55554f"


def draw(
    path: Path, rows: Sequence[Mapping[str, Any]], perplexity: Mapping[str, Mapping[str, float]], title: str
) -> None:
    """Write the picture.

    Args:
        rows: the device table's measured rows.
        perplexity: by file type, its figures.
    """
    figure = Figure(figsize=(11, 2.4 + 0.42 * max(len(rows), 3)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes = figure.subplots(1, 3, width_ratios=[1.15, 1.0, 0.8])
    labels = [f"{row['device']}, {row['type'].upper()}, {_threads(row['threads'])}" for row in rows]
    for axis, key, name in (
        (axes[0], "decode_tokens_per_s", "Decoding, tokens/s"),
        (axes[1], "prompt_tokens_per_s", "Prompt, tokens/s"),
    ):
        places = range(len(rows))
        medians = [row[key] for row in rows]
        spread = [
            [row[key] - row[f"{key}_low"] for row in rows],
            [row[f"{key}_high"] - row[key] for row in rows],
        ]
        axis.barh(places, medians, color=[_COLOURS.get(row["type"], _GREY) for row in rows], height=0.62)
        axis.errorbar(medians, places, xerr=spread, fmt="none", ecolor=_GREY, elinewidth=1, capsize=3)
        for place, value, high in zip(places, medians, (row[f"{key}_high"] for row in rows), strict=True):
            axis.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:.1f}",
                (high, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_yticks(places, labels if axis is axes[0] else [""] * len(rows), fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_xlim(left=0)
        _clean(axis)
    axis = axes[2]
    kinds = list(perplexity)
    values = [perplexity[kind]["perplexity"] for kind in kinds]
    axis.bar(range(len(kinds)), values, color=[_COLOURS.get(kind, _GREY) for kind in kinds], width=0.6)
    for place, value in enumerate(values):
        change = value / values[0] - 1
        text = f"{value:.2f}" if place == 0 else f"{value:.2f}\n({change:+.2%})"
        axis.annotate(
            text, (place, value), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9
        )
    axis.set_xticks(range(len(kinds)), [kind.upper() for kind in kinds], fontsize=9)
    axis.set_title("Perplexity on held-out text", loc="left", fontsize=10)
    axis.margins(y=0.22)
    axis.set_ylim(bottom=0)
    _clean(axis)
    save_figure(figure, path)


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _clean(axis: Any) -> None:
    axis.tick_params(length=0, labelsize=9, labelcolor=_GREY)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    axis.grid(axis="x" if axis.get_title(loc="left").endswith("/s") else "y", color="#e6e5df", linewidth=0.8)
    axis.set_axisbelow(True)
