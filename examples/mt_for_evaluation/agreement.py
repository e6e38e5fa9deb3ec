"""Do machine-translated test sets give the scores of human-translated ones?

Over languages, D = accuracy on machine minus accuracy on human translation, its mean, size and
correlation; over items, agreement and McNemar's test; intervals by drawing languages and items
again. Items are the same in all languages, so a draw of items is one for all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Mark", "Marks", "accuracy", "agreement", "bootstrap", "mcnemar", "pearson", "spearman"]


@dataclass(frozen=True)
class Mark:
    """An item as it was answered: the label given, whether it is right, and its cluster."""

    predicted: int
    right: bool
    cluster: str


Marks = Mapping[str, Mark]  # by key


def accuracy(marks: Marks) -> float:
    """Give the share of items that are right.

    Raises:
        ValueError: there is none.
    """
    if not marks:
        raise ValueError("there are no items to score; give at least one")
    return sum(mark.right for mark in marks.values()) / len(marks)


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Give Pearson's r; None for fewer than three points, or if a side is constant."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(x, y)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Give Spearman's rho, equal values sharing the mean of their ranks; None as `pearson`."""
    return pearson(_ranks(x), _ranks(y))


def mcnemar(human: Marks, machine: Marks) -> dict[str, float]:
    """Test whether items are as often right in one set as in the other.

    b items are right in the human set only, c in the machine's only;
    chi2 = (|b - c| - 1)^2 / (b + c), with one degree of freedom. `exact` is the binomial test, for
    few discordant items. Only items that both have count, `shared` of them; `agreement` is the
    share of these with the same prediction.

    Source:
        McNemar (1947), with the correction of Edwards (1948).
    """
    shared = [key for key in human if key in machine]
    b = sum(human[key].right and not machine[key].right for key in shared)
    c = sum(machine[key].right and not human[key].right for key in shared)
    same = sum(human[key].predicted == machine[key].predicted for key in shared)
    n = b + c
    chi2 = (abs(b - c) - 1) ** 2 / n if n else 0.0
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n
    return {
        "shared": len(shared),
        "agreement": same / len(shared) if shared else math.nan,
        "b": b,
        "c": c,
        "chi2": chi2,
        "p": math.erfc(math.sqrt(chi2 / 2)) if n else 1.0,
        "exact": min(1.0, 2 * tail),
    }


def agreement(
    human: Mapping[str, float],
    machine: Mapping[str, float],
    quality: Mapping[str, float] | None = None,
) -> dict[str, float | None]:
    """Compare accuracies by language; with `quality` also |D| against translation quality.

    Raises:
        ValueError: the languages differ, or there is none.
    """
    if not human or set(human) != set(machine):
        raise ValueError("give the same languages, at least one, for both kinds of translation")
    languages = sorted(human)
    d = [machine[name] - human[name] for name in languages]
    sides = ([machine[n] for n in languages], [human[n] for n in languages])
    rated = [name for name in languages if quality and name in quality]
    return {
        "languages": len(languages),
        "mean_d": statistics.mean(d),
        "mean_abs_d": statistics.mean(map(abs, d)),
        "max_abs_d": max(map(abs, d)),
        "pearson": pearson(*sides),
        "spearman": spearman(*sides),
        "spearman_abs_d_quality": spearman(
            [abs(machine[n] - human[n]) for n in rated], [(quality or {})[n] for n in rated]
        ),
    }


def bootstrap(
    human: Mapping[str, Marks], machine: Mapping[str, Marks], draws: int, seed: int
) -> dict[str, list[float]]:
    """Give 95 % intervals of the mean of D and of |D|, by drawing items and languages again.

    Clusters of items (an article and its paragraphs) are drawn with replacement, the same ones for
    all languages and both kinds; `over_items` keeps the languages as they are, `over_both` draws
    these as well. A cluster that is in neither set of a language counts nothing there. Interval of
    rho: `spearman`, over both, of the draws where it is defined.

    Raises:
        ValueError: the languages differ.
    """
    if set(human) != set(machine):
        raise ValueError("give the same languages for both kinds of translation")
    languages = sorted(human)
    both = [*human.values(), *machine.values()]
    clusters = sorted({mark.cluster for marks in both for mark in marks.values()})
    place = {cluster: i for i, cluster in enumerate(clusters)}

    def counts(marks: Marks) -> np.ndarray:
        table = np.zeros((len(clusters), 2))
        for mark in marks.values():
            table[place[mark.cluster]] += (mark.right, 1)
        return table

    tables = [np.stack([counts(side[name]) for name in languages]) for side in (human, machine)]
    chance = np.random.default_rng(seed)
    c, n = len(clusters), len(languages)
    weights = chance.multinomial(c, [1 / c] * c, size=draws).astype(float)
    scores = []
    for table in tables:
        sums = np.einsum("dc,lck->dlk", weights, table)
        with np.errstate(invalid="ignore", divide="ignore"):
            scores.append(sums[..., 0] / sums[..., 1])
    d = scores[1] - scores[0]
    picked = chance.integers(0, n, size=(draws, n))
    drawn = np.take_along_axis(d, picked, axis=1)
    rhos = [
        rho
        for row, pick in enumerate(picked)
        if (rho := spearman(list(scores[1][row, pick]), list(scores[0][row, pick]))) is not None
    ]
    found = {
        "mean_d over_items": np.nanmean(d, axis=1),
        "mean_d over_both": np.nanmean(drawn, axis=1),
        "mean_abs_d over_both": np.nanmean(abs(drawn), axis=1),
        "spearman over_both": np.array(rhos),
    }
    return {
        name: np.nanquantile(values, [0.025, 0.975]).tolist()
        for name, values in found.items()
        if len(values)
    }


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end + 1) / 2
        start = end
    return ranks
