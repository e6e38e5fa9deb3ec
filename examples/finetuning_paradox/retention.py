"""What finetuning leaves of a model's abilities: figures with intervals, a table, promises."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

# Figures of which less is better; of all others more is.
LESS_IS_BETTER = ("translation", "lm")


@dataclass(frozen=True)
class Figure:
    """A figure that is the ratio of two sums over items, which groups (documents) hold together."""

    numerators: list[float]
    denominators: list[float]
    groups: list[str]

    @property
    def value(self) -> float:
        """The figure of all items; nan if nothing counts."""
        return _ratio(sum(self.numerators), sum(self.denominators))

    def interval(self, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Give the 95 % interval of the bootstrap over groups (percentiles)."""
        if not self.groups:
            return math.nan, math.nan
        values = [
            _ratio(sum(self.numerators[i] for i in drawn), sum(self.denominators[i] for i in drawn))
            for drawn in _draws(self.groups, draws, seed)
        ]
        values = sorted(v for v in values if not math.isnan(v))
        if not values:
            return math.nan, math.nan
        return values[int(0.025 * len(values))], values[math.ceil(0.975 * len(values)) - 1]


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _draws(groups: Sequence[str], draws: int, seed: int) -> list[list[int]]:
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    names, drawn = list(members), random.Random(seed)
    return [
        [i for name in drawn.choices(names, k=len(names)) for i in members[name]]
        for _ in range(draws)
    ]


def loss(base: float, now: float) -> float:
    """Give how much of an ability of which more is better is lost, relative to the base."""
    return (base - now) / abs(base)


def usable(base: Mapping[str, Figure]) -> dict[str, bool]:
    """Tell which abilities the base model has at all (P0): an interval above zero."""
    return {
        name: figure.interval()[0] > 0
        for name, figure in base.items()
        if name not in LESS_IS_BETTER
    }


@dataclass(frozen=True)
class Judged:
    """What was promised and whether it held; None where there is nothing to judge.

    `lost` has a value for each seed; `recovered` and `control` for each seed that lost a tenth.
    """

    gain: bool
    paradox: bool | None
    remedy: bool | None
    lost: dict[str, list[float]]
    recovered: dict[str, list[float]]
    control: dict[str, list[float]]


Runs = Sequence[Mapping[str, float]]


def judge(
    base: Mapping[str, float], par: Runs, mix: Runs, abilities: Sequence[str], control: Runs = ()
) -> Judged:
    """Judge the promises P1 to P3 from the figures of the base and of each seed's runs.

    P1: `par` and `mix` lower the translation loss by 5 % or more. P2: `par` loses a tenth or more
    of at least two abilities, and its loss as a language model rises by 2 % or more, in at least
    two thirds of the seeds. P3: `mix` recovers at least half of each of those losses, on average
    over these seeds, more than `control` does, and its translation loss is within 1 % of `par`'s.
    """
    gain = all(run["translation"] <= 0.95 * base["translation"] for run in (*par, *mix))
    lost = {name: [loss(base[name], run[name]) for run in par] for name in abilities}
    seeds = [
        i
        for i, run in enumerate(par)
        if sum(lost[name][i] >= 0.1 for name in abilities) >= 2 and run["lm"] >= 1.02 * base["lm"]
    ]
    paradox = len(seeds) >= 2 * len(par) / 3 if len(abilities) >= 2 else None
    if not paradox:
        return Judged(gain, paradox, None, lost, {}, {})
    forgot = {name: [i for i in seeds if lost[name][i] >= 0.1] for name in abilities}
    forgot = {name: found for name, found in forgot.items() if found} | {"lm": seeds}

    def recovery(runs: Runs) -> dict[str, list[float]]:
        return {
            name: [(runs[i][name] - par[i][name]) / (base[name] - par[i][name]) for i in found]
            for name, found in forgot.items()
        }

    recovered, by_control = recovery(mix), recovery(control) if control else {}
    means = {name: fmean(values) for name, values in recovered.items()}
    remedy = (
        all(m["translation"] <= 1.01 * p["translation"] for m, p in zip(mix, par, strict=True))
        and all(mean >= 0.5 for mean in means.values())
        and all(means[name] > fmean(values) for name, values in by_control.items())
    )
    return Judged(gain, True, remedy, lost, recovered, by_control)
