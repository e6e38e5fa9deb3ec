"""The grid over all ordered pairs of languages, and what is computed from it.

M[P,H] = mean score of { (a in P, b in H) }
within(L) = M[L,L]
across(L) = (sum over L' of M[L,L'] + M[L',L], L' other than L) / (2 (N - 1))
gap(L) = within(L) - across(L)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parallel_pairs import ParallelPairs, Row
from torch import Tensor
from tqdm.auto import tqdm

from recipes_peft import report
from recipes_peft.errors import UserError, explained

__all__ = [
    "Cells",
    "Scores",
    "Summary",
    "bootstrap",
    "by_class",
    "by_script",
    "cross_grid",
    "pooled",
    "scored",
    "within_across",
]

# what was predicted for the rows of each cell, in their order
Cells = dict[tuple[str, str], list[Any]]
# gives, by the name of a model, a prediction for each row
Predict = Callable[[Sequence[Row]], Mapping[str, list[Any]]]
Score = Callable[[Any, Any], float]  # (prediction, target), from 0 to 1


def cross_grid(
    predict: Predict,
    names: Sequence[str],
    data: ParallelPairs,
    folder: Path | None = None,
    title: str = "grid",
    cells: Sequence[tuple[str, str]] | None = None,
    quiet: bool = False,
) -> dict[str, Cells]:
    """Predict all cells, or those named, with all models at a time.

    With `folder` every cell is written when it is finished and not predicted again.

    Raises:
        UserError: a cell has no rows, or a file of the folder is of other rows or cannot be read.
    """
    languages = data.languages
    wanted = list(cells or [(a, b) for a in languages for b in languages])
    found: dict[str, Cells] = {name: {} for name in names}
    for first, second in tqdm(wanted, desc=title, disable=quiet):
        rows = data.cell(first, second)
        if not rows:
            raise UserError(
                f"no row has both a first segment in {first} and a second in {second}; leave one"
                " out with --languages"
            )
        file = folder / f"{first}-{second}.json" if folder else None
        predicted = _read(file, len(rows), names) if file and file.exists() else None
        if predicted is None:
            predicted = predict(rows)
            if file:
                report.write_json(file, predicted)
        for name in names:
            found[name][first, second] = predicted[name]
    return found


def _read(file: Path, count: int, names: Sequence[str]) -> Mapping[str, list[Any]] | None:
    with explained(ValueError, before=f"{file} is torn: ", after="; delete it"):
        kept = json.loads(file.read_text(encoding="utf-8"))
    if not set(names) <= set(kept):
        return None  # of fewer models
    if any(len(kept[name]) != count for name in names):
        raise UserError(f"{file} is of other rows than there are now; delete its folder")
    return kept


@dataclass(frozen=True)
class Scores:
    """Sums of scores and numbers of rows, by group, first and second language.

    Shapes:
        total, count: (groups, N, N), float64.
    """

    languages: Sequence[str]
    total: Tensor
    count: Tensor

    @property
    def matrix(self) -> Tensor:
        """Give M, the mean score of every cell: (N, N); NaN where there is no row."""
        return self.total.sum(0) / self.count.sum(0)

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.languages, self.total + other.total, self.count + other.count)


def scored(
    cells: Cells, data: ParallelPairs, score: Score, keep: Callable[[Row], bool] | None = None
) -> Scores:
    """Score predictions, of all rows or of those that `keep` wants."""
    groups = {name: i for i, name in enumerate(dict.fromkeys(data.groups))}
    languages = data.languages
    size = (len(groups), len(languages), len(languages))
    total, count = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
    for (first, second), predictions in cells.items():
        p, h = languages.index(first), languages.index(second)
        for row, found in zip(data.cell(first, second), predictions, strict=True):
            if keep is None or keep(row):
                group = groups[data.groups[row.index]]
                total[group, p, h] += score(found, row.target)
                count[group, p, h] += 1
    return Scores(languages, total, count)


@dataclass(frozen=True)
class Summary:
    """Scores within languages and across them, by language: (N,) each, or (samples, N)."""

    within: Tensor
    across: Tensor

    @property
    def gap(self) -> Tensor:
        return self.within - self.across

    def means(self) -> dict[str, float]:
        """Give the means over languages."""
        return {n: float(getattr(self, n).mean()) for n in ("within", "across", "gap")}


def within_across(matrix: Tensor) -> Summary:
    """Compare the diagonal with the mean of the rest of each language's row and column.

    Shapes:
        matrix: (..., N, N), first segments' languages along the rows. Returns (..., N) each.
    Raises:
        ValueError: the matrix is not square, or of one language.
    """
    n = matrix.shape[-1]
    if matrix.dim() < 2 or matrix.shape[-2] != n or n < 2:
        raise ValueError(
            f"the grid has shape {tuple(matrix.shape)}; across needs a square of two languages or"
            " more"
        )
    within = matrix.diagonal(dim1=-2, dim2=-1)
    both = matrix.sum(-1) + matrix.sum(-2) - 2 * within
    return Summary(within, both / (2 * (n - 1)))


def bootstrap(
    scores: Sequence[Scores], statistic: Callable[..., Tensor], samples: int, seed: int = 0
) -> tuple[float, float]:
    """Give the 2.5th and 97.5th percentile of a statistic over resampled groups.

    All scores are resampled alike, so that differences are paired; `statistic` takes their
    matrices, (samples, N, N) each, and gives (samples,).
    """
    groups = len(scores[0].total)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(groups, (samples, groups), generator=generator)
    weights = torch.zeros(samples, groups, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    matrices = [
        torch.tensordot(weights, s.total, 1) / torch.tensordot(weights, s.count, 1) for s in scores
    ]
    # A cell that a sample of groups leaves empty makes that sample no number.
    low, high = statistic(*matrices).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def by_class(
    cells: Cells, data: ParallelPairs, merged: Mapping[int, int] | None = None
) -> dict[str, dict[str, float | None]]:
    """Give the accuracy inside each gold class, within and across languages.

    `merged` maps classes to fewer ones, in targets and predictions, such as the two classes that
    are not entailment to one.
    """

    def name(label: int) -> int:
        return (merged or {}).get(label, label)

    labels = sorted({name(t) for side in data.targets.values() for t in side if t is not None})
    found = {}
    for label in labels:
        part = scored(
            cells,
            data,
            lambda a, b: float(name(a) == name(b)),
            lambda row, label=label: name(row.target) == label,
        )
        found[str(label)] = pooled(part)
    return found


def pooled(scores: Scores) -> dict[str, float | None]:
    """Give means over the cells within languages and across them, cells of no row left out.

    None where no cell has a row.
    """
    matrix = scores.matrix
    diagonal = torch.eye(len(matrix), dtype=torch.bool)
    means = [float(matrix[part].nanmean()) for part in (diagonal, ~diagonal)]
    within, across = (None if math.isnan(mean) else mean for mean in means)
    known = within is not None and across is not None
    return {"within": within, "across": across, "gap": within - across if known else None}


def by_script(
    matrix: Tensor, languages: Sequence[str], scripts: Mapping[str, str]
) -> dict[str, float]:
    """Give the mean score across languages of one script, of different ones, and of each pair."""
    cells: dict[str, list[float]] = {"same": [], "different": []}
    for p, first in enumerate(languages):
        for h, second in enumerate(languages):
            if p != h:
                a, b = scripts[first], scripts[second]
                value = float(matrix[p, h])
                cells["same" if a == b else "different"].append(value)
                cells.setdefault(f"{a}-{b}", []).append(value)
    return {name: sum(v) / len(v) for name, v in cells.items() if v}
