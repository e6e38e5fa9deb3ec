"""Draw the study: points of a layer or of every layer, means over layers, and scores of heads."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes_peft.report import write

__all__ = ["heads", "layers", "points"]

# method: for each layer, dM and dD of each example of each seed
Changes = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]


def points(path: Path, changes: Changes, chosen: Sequence[int], names: Mapping[int, str]) -> None:
    """Draw dM over dD, a point for each example: a row for each method, a column for each layer.

    The dotted line is where a move at right angles to the representation would put it. A column has
    axes of its own, since layers differ by orders of magnitude.
    """
    size = (2.6 * len(chosen) + 0.6, 2.4 * len(changes) + 0.4)
    figure, grid = _figure(size, len(changes), len(chosen), sharex="col", sharey="col")
    for column, layer in zip(grid.T, chosen, strict=True):
        least = min(float(min(found[layer][1])) for found in changes.values())
        highest = max(float(max(found[layer][0])) for found in changes.values())
        aside = np.linspace(max(least, 0.05), 1, 200)
        for axis, (method, found) in zip(column, changes.items(), strict=True):
            magnitude, direction = found[layer]
            axis.plot(aside, 1 / aside - 1, color="gray", linestyle=":", linewidth=1)
            axis.scatter(direction, magnitude, s=4, alpha=0.4, linewidths=0)
            axis.set_title(f"{method}, {names[layer]}", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.locator_params(nbins=3)
        column[0].set_xlim(1 - 1.05 * max(1 - least, 1e-9), 1 + 0.03 * max(1 - least, 1e-9))
        column[0].set_ylim(-0.03 * highest, 1.05 * max(highest, 1e-9))
        column[-1].set_xlabel("dD = cos (less is more rotation)", fontsize=8)
    for axis in grid[:, 0]:
        axis.set_ylabel("dM")
    _save(figure, path)


def layers(path: Path, means: Mapping[str, Any], names: Mapping[int, str]) -> None:
    """Draw means over layers, a line for each method and a band over seeds.

    Shapes:
        means: for each method an array (seeds, layers, 3): dM, 1 - dD, share of the magnitude.
    """
    titles = ("mean dM (length)", "mean 1 - dD (direction)", "length's share of the squared move")
    figure, grid = _figure((11, 3.4), 1, 3)
    for k, (axis, title) in enumerate(zip(grid[0], titles, strict=True)):
        for method, found in means.items():
            across = list(range(found.shape[1]))
            (line,) = axis.plot(across, found[:, :, k].mean(0), "o-", markersize=3, label=method)
            low, high = found[:, :, k].min(0), found[:, :, k].max(0)
            axis.fill_between(across, low, high, alpha=0.2, color=line.get_color())
        axis.set_title(title, fontsize=10)
        axis.set_xticks(list(names), list(names.values()), rotation=60, fontsize=7)
        axis.set_ylim(bottom=0)
    grid[0][0].legend(fontsize=8)
    _save(figure, path)


def heads(path: Path, scores: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw the test scores of heads: a group of bars for each task, with a point for each seed."""
    figure, grid = _figure((2.5 + 2.2 * len(scores), 3.4), 1, 1)
    axis = grid[0][0]
    kinds = list(next(iter(scores.values())))
    width = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        places = [i + (k - (len(kinds) - 1) / 2) * width for i in range(len(scores))]
        values = [scores[task][kind] for task in scores]
        axis.bar(places, [sum(v) / len(v) for v in values], width * 0.9, label=kind, alpha=0.7)
        for place, found in zip(places, values, strict=True):
            axis.plot([place] * len(found), found, "k.", markersize=3)
    axis.set_xticks(range(len(scores)), list(scores))
    axis.set_ylabel("score on the test half")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _figure(
    size: tuple[float, float], rows: int, columns: int, **shared: str
) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write(path, image.getvalue())
