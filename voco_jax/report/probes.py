"""The picture of a probe: label fractions against balanced accuracy."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float, float, float]]
"""Points (fraction of the labels, mean, low, high)."""
_COLOURS = ("#1f5fb4", "#8a8f98")


def draw_probe(
    curves: Mapping[str, Mapping[str, Curve]], chance: float, title: str, metric: str
) -> np.ndarray:
    """A panel for each method with a line for each set of features, with its interval.

    Args:
        curves: by method, by name of the features (two at most), the points by growing fraction.
        chance: of the metric by guessing.
        title: of the picture.
        metric: what is on the vertical axis.

    Returns:
        (rows, columns, 3) uint8.
    """
    figure = Figure(figsize=(4.2 * len(curves), 4.5), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (method, lines) in zip(panels, curves.items(), strict=True):
        for (name, points), colour in zip(lines.items(), _COLOURS, strict=False):
            share, mean, low, high = (np.array(column) for column in zip(*points, strict=True))
            ends = np.array([mean - low, high - mean]).clip(0)
            panel.fill_between(share, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.errorbar(share, mean, ends, color=colour, marker="o", capsize=3, label=name)
        panel.axhline(chance, color="#c0392b", linestyle=":", label="majority class")
        panel.set_xscale("log")
        panel.set_xticks(share, [f"{100 * one:g} %" for one in share])
        panel.minorticks_off()
        panel.set_title(method, fontsize=10)
        panel.set_xlabel("share of the patients whose labels are known")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(f"{metric}, with 95 % interval")
    panels[0].set_ylim(top=1.02)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
