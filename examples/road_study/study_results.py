"""Bring the runs together: means over examples, tables, CSV files and figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import study_equations as equations
import study_figures as figures
import torch

from recipes_peft import report

__all__ = ["Changes", "changes", "document", "draw", "kept", "show", "write_csv"]

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
Scores = Mapping[str, Mapping[str, Sequence[float]]]


class Changes(NamedTuple):
    """For each method: means over examples, and how dM and 1 - dD go together over examples.

    Shapes:
        means: (seeds, layers + 1, 3): dM, 1 - dD, length's share of the squared move.
    """

    means: dict[str, Any]
    correlations: dict[str, list[float]]


def kept(file: Path, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """Give what `make` makes, or what the file has of it if it was made with the same settings."""
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            print(f"{file.stem}: kept from the run before")
            return found["result"]
    made = make()
    report.write_json(file, {"settings": settings, "result": made})
    return made


def changes(runs: Runs) -> Changes:
    """Reduce the runs; the correlation is that in the second-last block."""
    means, correlations = {}, {}
    for method, found in runs.items():
        magnitude = np.array([run["magnitude"] for run in found])
        rotation = 1 - np.array([run["direction"] for run in found])
        share = np.array([run["length_share"] for run in found])
        means[method] = np.stack([magnitude.mean(2), rotation.mean(2), share], axis=2)
        pairs = zip(torch.tensor(magnitude[:, -2]), torch.tensor(rotation[:, -2]), strict=True)
        correlations[method] = [equations.rank_correlation(m, r) for m, r in pairs]
    return Changes(means, correlations)


def names(depth: int) -> dict[int, str]:
    """Name the layers: the embeddings, then blocks from 1."""
    return {0: "embeddings", **{k: f"block {k}" for k in range(1, depth)}}


def show(runs: Runs, found: Changes, scores: Scores) -> None:
    """Print a row for each method, a row for each layer, and a row for each head."""
    rows = [
        [
            method,
            f"{runs[method][0]['trained_parameters']:,}",
            spread([run["score"] for run in runs[method]]),
            *(spread(means[:, -2, k]) for k in range(3)),
            spread(found.correlations[method]),
            f"{np.mean([run['seconds'] for run in runs[method]]):.0f}",
        ]
        for method, means in found.means.items()
    ]
    columns = ["", "trained", "score", "dM", "1 - dD", "length's share", "correlation", "s"]
    report.show("Second-last block: mean over seeds, and their range", columns, rows)
    layers = names(next(iter(found.means.values())).shape[1])
    rows = [
        [name, *(f"{means[:, k, j].mean():.4f}" for means in found.means.values() for j in (0, 1))]
        for k, name in layers.items()
    ]
    columns = ["", *(f"{method}, {what}" for method in found.means for what in ("dM", "1 - dD"))]
    report.show("Every layer: mean over examples and seeds", columns, rows)
    kinds = list(next(iter(scores.values())))
    rows = [[task, *(spread(found[kind]) for kind in kinds)] for task, found in scores.items()]
    report.show("Heads on a frozen encoder: score on the test half", ["", *kinds], rows)


def spread(values: Sequence[float]) -> str:
    """Write a mean, and the least and the greatest value where there are several."""
    ends = f" ({np.min(values):.3f}, {np.max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{ends}"


def draw(out: Path, runs: Runs, found: Changes, scores: Scores) -> None:
    """Draw the four figures."""
    pooled = {
        method: [
            [
                np.ravel([run[what][layer] for run in found_runs])
                for what in ("magnitude", "direction")
            ]
            for layer in range(len(found_runs[0]["magnitude"]))
        ]
        for method, found_runs in runs.items()
    }
    depth = len(next(iter(pooled.values())))
    figures.points(out / "points.png", pooled, [depth - 2], names(depth))
    figures.points(out / "points_every_layer.png", pooled, range(1, depth), names(depth))
    figures.layers(out / "layers.png", found.means, names(depth))
    figures.heads(out / "heads.png", scores)


def write_csv(out: Path, runs: Runs, found: Changes, scores: Scores) -> None:
    """Write every point, the means of every layer, and the scores of the heads."""
    _write(
        out / "points.csv",
        ["method", "run", "layer", "example", "dM", "dD"],
        (
            [method, number, layer, example, m, d]
            for method, found_runs in runs.items()
            for number, run in enumerate(found_runs)
            for layer, pair in enumerate(zip(run["magnitude"], run["direction"], strict=True))
            for example, (m, d) in enumerate(zip(*pair, strict=True))
        ),
    )
    _write(
        out / "layers.csv",
        ["method", "run", "layer", "mean_dM", "mean_1_minus_dD", "length_share"],
        (
            [method, number, layer, *values]
            for method, means in found.means.items()
            for number, run in enumerate(means.tolist())
            for layer, values in enumerate(run)
        ),
    )
    _write(
        out / "heads.csv",
        ["task", "head", "run", "score"],
        (
            [task, kind, number, value]
            for task, by_kind in scores.items()
            for kind, values in by_kind.items()
            for number, value in enumerate(values)
        ),
    )


def document(runs: Runs, found: Changes) -> dict[str, Any]:
    """Give what a JSON document keeps of the runs: everything but the single points."""
    return {
        "methods": {
            method: {
                "score": [run["score"] for run in runs[method]],
                "seconds": [run["seconds"] for run in runs[method]],
                "trained_parameters": runs[method][0]["trained_parameters"],
                "layers": means.tolist(),
                "correlation": found.correlations[method],
            }
            for method, means in found.means.items()
        }
    }


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    report.write(path, text.getvalue().encode())
