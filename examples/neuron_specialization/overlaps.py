"""What the counts say about languages: overlaps, heat maps, and which promises they keep."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from directions import Task
from masking import Table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from selection import mean_overlap, overlap, permutation_p, sparsity
from torch import Tensor

from recipes_peft import report

__all__ = ["heat_maps", "modularity", "promised", "same_task", "side_layers", "write_tables"]

KIND = {"encoder": "to", "decoder": "from"}  # the tasks that a side is compared on


def side_layers(table: Table, side: str) -> list[str]:
    """Give the blocks of a side, the first one first."""
    found = [name for name in table.layers if (side == "encoder") == ("encoder" in name.split("."))]
    return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def side_overlap(
    keep: Table, layer: str, tasks: Sequence[Task], side: str
) -> tuple[Tensor, list[str]]:
    """Give the overlaps (tasks, tasks) of the tasks that a side is compared on, and languages."""
    chosen = [task for task in tasks if task.kind == KIND[side]]
    rows = [keep.tasks.index(task.name) for task in chosen]
    return overlap(keep.layers[layer][rows]), [task.language for task in chosen]


def same_task(one: Table, other: Table) -> float:
    """Give the overlap of a task's neurons in two tables, the mean over tasks and blocks."""
    found = []
    for name, rows in one.layers.items():
        pairs = torch.stack([rows, other.layers[name]], 1)  # (tasks, 2, d_ff)
        found += [overlap(pair)[0, 1].item() for pair in pairs]
    return sum(found) / len(found)


def modularity(
    halves: tuple[Table, Table], tasks: Sequence[Task], families: Sequence[Sequence[str]], k: float
) -> dict[str, Any]:
    """Measure whether neurons are specific to tasks, from counts on two halves of the data."""
    first, second = (half.select(lambda *_: k) for half in halves)
    keep = (halves[0] + halves[1]).select(lambda *_: k)
    found: dict[str, Any] = {"same_task": same_task(first, second)}
    for side in KIND:
        tables = {name: side_overlap(keep, name, tasks, side) for name in side_layers(keep, side)}
        found[f"{side}_mean"] = [mean_overlap(table) for table, _ in tables.values()]
        where = (0, "first_encoder") if side == "encoder" else (-1, "last_decoder")
        table, languages = list(tables.values())[where[0]]
        related = [
            (i, j)
            for j in range(len(languages))
            for i in range(j)
            if any({languages[i], languages[j]} <= set(family) for family in families)
        ]
        if related and len(related) < math.comb(len(languages), 2):
            found[where[1]] = dict(
                zip(("difference", "p"), permutation_p(table, related), strict=True)
            )
    found["cross_task"] = found["decoder_mean"][-1]
    return found


def write_tables(folder: Path, at_analysis: Table, used: Table, tasks: Sequence[Task]) -> None:
    """Write `overlap.csv`, of the k of the analysis, and `sparsity.csv`, of the masks in use."""
    rows = []
    for side in KIND:
        for number, name in enumerate(side_layers(at_analysis, side), 1):
            table, languages = side_overlap(at_analysis, name, tasks, side)
            rows += [
                [side, number, a, b, f"{table[i, j]:.4f}"]
                for i, a in enumerate(languages)
                for j, b in enumerate(languages)
            ]
    _write_csv(folder / "overlap.csv", ["side", "layer", "language", "other", "iou"], rows)
    rows = []
    for side in KIND:
        for number, name in enumerate(side_layers(used, side), 1):
            shares = sparsity(used.layers[name]).tolist()
            rows += [[side, number, t, f"{s:.4f}"] for t, s in zip(used.tasks, shares, strict=True)]
    _write_csv(folder / "sparsity.csv", ["side", "layer", "task", "masked"], rows)


def heat_maps(path: Path, keep: Table, tasks: Sequence[Task]) -> None:
    """Draw the overlaps of languages in every block, the encoder above the decoder."""
    depth = max(len(side_layers(keep, side)) for side in KIND)
    figure = Figure(figsize=(2.6 * depth + 1, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, depth, squeeze=False)
    for row, side in zip(axes, KIND, strict=True):
        for axis in row[len(side_layers(keep, side)) :]:
            axis.remove()
        for number, (axis, name) in enumerate(zip(row, side_layers(keep, side), strict=False), 1):
            table, languages = side_overlap(keep, name, tasks, side)
            shown = axis.imshow(table.numpy(), vmin=0, vmax=1, cmap="viridis")
            places = range(len(languages))
            axis.set_xticks(places, languages, fontsize=7)
            axis.set_yticks(places, languages, fontsize=7)
            axis.set_title(f"{side} {number}: {mean_overlap(table):.2f}", fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.6, label="overlap (IoU)")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    report.write(path, image.getvalue())


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(columns)
    lines.writerows(rows)
    report.write(path, text.getvalue().encode())


def promised(found: Mapping[str, Any], languages: int) -> dict[str, bool]:
    """Say which of the promises about the counts were kept."""
    kept = {
        "a task's neurons in two halves of its data overlap by 0.90 or more": found["same_task"]
        >= 0.9,
        "languages overlap less than that by 0.10 or more in the last decoder layer": found[
            "same_task"
        ]
        - found["cross_task"]
        >= 0.1,
    }
    for place in ("first_encoder", "last_decoder"):
        if place in found:
            test = found[place]
            kept[f"related languages overlap more than others ({place.replace('_', ' ')})"] = test[
                "difference"
            ] > 0 and (languages < 5 or test["p"] < 0.05)
    return kept
