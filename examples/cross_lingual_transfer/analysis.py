"""Where scores come from: classes, overlap, nearness of answers, scripts, hard negatives."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grid
import torch
from grid import Cells, Scores
from parallel_pairs import Row
from prepare import Data
from shortcuts import ABSENT, BINS, bin_of, overlap, script

__all__ = [
    "analyse",
    "differences",
    "distances",
    "hard_within",
    "interval",
    "overlaps",
    "scripts",
    "sum_of",
]

NEARNESS = {"[0, 5)": 5.0, "[5, 10)": 10.0, "[10, 20)": 20.0, "[20, 400)": ABSENT}
FAR = "none or cut"
# XNLI's classes as entailment (0) and not; and the class that overlap speaks for, by task
MERGED = {"xnli": {0: 0, 1: 1, 2: 1}}
POSITIVE = {"xnli": 0}
# arms whose difference is given, the first minus the second
COMPARED = (("road", "lora"), ("road", "full"), ("lora", "full"))


def scripts(data: Data) -> dict[str, str]:
    """Name the script of each language, by its second segments."""
    return {name: script(texts[:50]) for name, texts in data.test.second.items()}


def analyse(cells: Cells, data: Data, task: Any, name: str) -> dict[str, Any]:
    """Give all that is computed of a grid of predictions, as a document.

    `task` has the metrics, the first of which is the main one; `name` is that of the data's task.
    """
    found: dict[str, Any] = {"languages": data.test.languages, "metrics": {}}
    written = scripts(data)
    for metric, score in task.metrics.items():
        scores = grid.scored(cells, data.test, score)
        summary = grid.within_across(scores.matrix)
        found["metrics"][metric] = {
            "matrix": scores.matrix.tolist(),
            "within": summary.within.tolist(),
            "across": summary.across.tolist(),
            "gap": summary.gap.tolist(),
            "means": summary.means(),
            "by_script": grid.by_script(scores.matrix, data.test.languages, written),
        }
    if data.answers:
        found["by_distance"] = distances(cells, data, task)
    else:
        found["by_class"] = grid.by_class(cells, data.test)
        if name in MERGED:
            found["by_merged_class"] = grid.by_class(cells, data.test, MERGED[name])
        found["by_overlap"] = overlaps(cells, data, POSITIVE.get(name, 1))
    return found


def _in_bins(
    cells: Cells,
    data: Data,
    bins: Sequence[str],
    bin_: Callable[[Row], str],
    values: Mapping[str, Any],
) -> dict[str, dict[str, dict[str, float]]]:
    """Give the number of rows and the mean values of each bin, within languages and across."""
    sums: dict[tuple[str, str], dict[str, float]] = {}
    for (first, second), predictions in cells.items():
        kind = "within" if first == second else "across"
        for row, predicted in zip(data.test.cell(first, second), predictions, strict=True):
            part = sums.setdefault((kind, bin_(row)), dict.fromkeys(["rows", *values], 0.0))
            part["rows"] += 1
            for name, value in values.items():
                part[name] += value(predicted, row.target)
    return {
        kind: {
            name: {k: v if k == "rows" else v / part["rows"] for k, v in part.items()}
            for name in bins
            if (part := sums.get((kind, name)))
        }
        for kind in ("within", "across")
    }


def overlaps(cells: Cells, data: Data, positive: int) -> dict[str, Any]:
    """Give by overlap of the segments: how often the positive class is right, and is answered."""
    values = {
        "gold": lambda found, wanted: float(wanted == positive),
        "predicted": lambda found, wanted: float(found == positive),
        "accuracy": lambda found, wanted: float(found == wanted),
    }
    return _in_bins(cells, data, BINS, lambda row: bin_of(overlap(row.first, row.second)), values)


def distances(cells: Cells, data: Data, task: Any) -> dict[str, Any]:
    """Give F1 and exact match by how near to the answer the question's tokens stand."""

    def name(row: Row) -> str:
        distance = task.distance(row)
        return next((word for word, edge in NEARNESS.items() if distance < edge), FAR)

    return _in_bins(cells, data, [*NEARNESS, FAR], name, task.metrics)


def hard_within(
    predict: Callable[[Sequence[Row]], Mapping[str, list[Any]]], names: Sequence[str], data: Data
) -> dict[str, dict[str, float]]:
    """Give the accuracy within each language where negatives are those of most overlap."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for language, pairs in data.hard.items():
        rows = pairs.cell(language, language)
        for name, predictions in predict(rows).items():
            right = [a == row.target for a, row in zip(predictions, rows, strict=True)]
            found[name][language] = sum(right) / len(right)
    return found


def interval(scores: Sequence[Scores], samples: int, of: str = "gap") -> tuple[float, float]:
    """Give the bootstrap interval of a mean over languages, or of the difference of two.

    `of` is gap, within or across.
    """

    def mean(*matrices: torch.Tensor) -> torch.Tensor:
        means = [getattr(grid.within_across(matrix), of).mean(-1) for matrix in matrices]
        return means[0] - means[1] if len(means) > 1 else means[0]

    return grid.bootstrap(scores, mean, samples)


def differences(
    scores: Mapping[str, Mapping[int, Scores]], samples: int
) -> dict[str, dict[str, Any]]:
    """Compare arms on the seeds that both have: the difference and its paired interval.

    `scores` are those of each arm by seed. Compared are RoAd, LoRA and every weight, and every arm
    of ApiQ with LoRA.
    """
    pairs = [*COMPARED, *((arm, "lora") for arm in scores if arm.startswith("apiq"))]
    found: dict[str, dict[str, Any]] = {}
    for one, other in pairs:
        seeds = sorted(set(scores.get(one, {})) & set(scores.get(other, {})))
        if not seeds:
            continue
        both = [sum_of([scores[arm][seed] for seed in seeds]) for arm in (one, other)]
        means = [grid.within_across(s.matrix).means() for s in both]
        found[f"{one} - {other}"] = {"seeds": seeds} | {
            of: {"difference": means[0][of] - means[1][of], "95": interval(both, samples, of)}
            for of in ("within", "across", "gap")
        }
    return found


def sum_of(scores: Sequence[Scores]) -> Scores:
    """Pool the scores of several seeds."""
    return functools.reduce(operator.add, scores)
