"""One style of figures: ``figure = new_figure((9, 4)); …; save_figure(figure, path)``."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from components.artifacts import write_atomically

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_DPI = 130


def tidy(axes: Axes) -> None:
    """Leave out what carries no figure: the frame's upper and right side; faint horizontal lines stay."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, in one rename and with no trace of the library's version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
