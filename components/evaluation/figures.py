"""Pictures of routing: ``draw_heatmap(routing, path)`` and ``draw_sparsity(routing, path)``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from components.evaluation.activations import COLD_FREQUENCY, Floats, RoutingStatistics
from components.measures.figures import save_figure, tidy

_LABELLED_CELLS = 160  # above this the numbers in the cells would not be readable


def _map(axes: Axes, frequency_LE: Floats, top: float, numbers: bool) -> AxesImage:
    image = axes.imshow(frequency_LE, aspect="auto", cmap="viridis", vmin=0.0, vmax=top, origin="lower")
    if numbers and frequency_LE.size <= _LABELLED_CELLS:
        for (layer, expert), value in np.ndenumerate(frequency_LE):
            colour = "black" if value > 0.6 * top else "white"
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
    return image


def draw_heatmap(routing: RoutingStatistics, path: Path) -> None:
    """Share of tokens that choose each expert: layers over experts, for all text and for each category."""
    names = list(routing.chosen)
    maps = {name: routing.frequency(name) for name in names}
    whole = routing.frequency()
    top = max(float(values.max()) for values in (whole, *maps.values()))
    columns = 3
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9.5, 4.6 + 2.1 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 2, columns)
    main = figure.add_subplot(grid[:2, :])
    image = _map(main, whole, top, numbers=True)
    even = routing.top_k / routing.experts
    main.set_title(
        f"all held-out text ({sum(routing.tokens.values()):,} tokens); even use would be {even:.2f}"
    )
    main.set_xlabel("expert")
    main.set_ylabel("layer")
    panels = []
    for number, name in enumerate(names):
        axes = figure.add_subplot(grid[2 + number // columns, number % columns])
        _map(axes, maps[name], top, numbers=False)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        panels.append(axes)
    figure.colorbar(image, ax=[main, *panels], label="share of tokens that choose the expert", shrink=0.6)
    save_figure(figure, path)


def draw_sparsity(routing: RoutingStatistics, path: Path) -> None:
    """Neuron sparsity per layer: one point per expert and batch of held-out text."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(
        routing.sparsity_samples,
        positions=range(routing.layers),
        widths=0.6,
        showfliers=routing.layers <= 16,
        flierprops={"markersize": 2, "alpha": 0.4},
        medianprops={"color": "#D55E00", "linewidth": 1.6},
    )
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.annotate("half of the neurons silent", (0.005, 0.5), xycoords=("axes fraction", "data"), fontsize=7)
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("layer")
    axes.set_ylabel("silent neurons in a chosen expert (share)")
    cold = float((routing.frequency() < COLD_FREQUENCY).mean())
    axes.set_title(
        f"mean {routing.mean_sparsity:.1%} silent; {cold:.1%} of experts chosen by fewer than "
        f"{COLD_FREQUENCY:.0%} of tokens",
        fontsize=10,
    )
    tidy(axes)
    save_figure(figure, path)
