"""Are the usual test languages like all languages of their class?

Within a class of languages: O = mean over the official ones - mean over all of them, beside random
sets of as many languages; and how the lead over a baseline changes from seen to unseen languages.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence

import numpy as np

__all__ = ["overestimation", "permutation_test", "subset_null"]


def overestimation(
    scores: Mapping[str, float], official: Collection[str], draws: int, seed: int
) -> dict[str, float | int | list[float]] | None:
    """Give O of a class, its 95 % interval and the percentile of the official set.

    The interval draws official and other languages with replacement, each among their own; its
    length says little with two official ones. None if the class has no official language, or no
    other.
    """
    inside = [scores[name] for name in sorted(scores) if name in official]
    outside = [scores[name] for name in sorted(scores) if name not in official]
    if not inside or not outside:
        return None
    o = statistics.mean(inside) - statistics.mean(inside + outside)
    chance = np.random.default_rng(seed)
    drawn = []
    for values in (inside, outside):
        picked = chance.integers(0, len(values), size=(draws, len(values)))
        drawn.append(np.array(values)[picked])
    values = drawn[0].mean(1) - np.concatenate(drawn, 1).mean(1)
    return {
        "official": len(inside),
        "all": len(inside) + len(outside),
        "mean_official": statistics.mean(inside),
        "mean_all": statistics.mean(inside + outside),
        "o": o,
        "interval": np.quantile(values, [0.025, 0.975]).tolist(),
        "percentile": subset_null(inside + outside, inside, draws, seed),
    }


def subset_null(
    everyone: Sequence[float], official: Sequence[float], draws: int, seed: int
) -> float:
    """Give the percentile (0 to 100) of the official mean among means of random sets of its size.

    Sets are drawn without replacement; ties count half.

    Raises:
        ValueError: there are more official scores than scores.
    """
    if not 0 < len(official) <= len(everyone):
        raise ValueError(f"{len(official)} of {len(everyone)} scores cannot be drawn")
    chance, values = np.random.default_rng(seed), np.array(everyone)
    means = np.array(
        [chance.choice(values, len(official), replace=False).mean() for _ in range(draws)]
    )
    mean = float(np.mean(official))
    tied = np.isclose(means, mean, rtol=0, atol=1e-12)
    return float(100 * (np.mean((means < mean) & ~tied) + 0.5 * np.mean(tied)))


def permutation_test(
    smaller: Sequence[float], larger: Sequence[float], draws: int, seed: int
) -> dict[str, float] | None:
    """Test whether the mean of the first is below that of the second, one-sided.

    Languages change sides at random; p = (draws at least as extreme + 1) / (draws + 1). None if a
    side is empty.
    """
    if not smaller or not larger:
        return None
    gap = statistics.mean(larger) - statistics.mean(smaller)
    chance, values = np.random.default_rng(seed), np.array([*smaller, *larger])
    hits = 0
    for _ in range(draws):
        mixed = chance.permutation(values)
        hits += mixed[len(smaller) :].mean() - mixed[: len(smaller)].mean() >= gap - 1e-12
    return {"difference": gap, "p": (int(hits) + 1) / (draws + 1)}
