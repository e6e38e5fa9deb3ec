"""What finetuning leaves of a model's abilities: figures with intervals, and what was promised."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

# Figures of which less is better; of all others more is.
LESS_IS_BETTER = ("translation", "lm", "lm-source", "lm-target")
Interval = tuple[float, float]


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

    def interval(self, draws: int = 1000, seed: int = 0) -> Interval:
        """Give the 95 % interval of the bootstrap over groups (percentiles)."""
        return _percentiles(self.drawn(draws, seed))

    def drawn(self, draws: int, seed: int) -> list[float]:
        """Give the figure of each draw of the bootstrap; the same groups give the same draws."""
        return [
            _ratio(sum(self.numerators[i] for i in drawn), sum(self.denominators[i] for i in drawn))
            for drawn in _draws(self.groups, draws, seed)
        ]

    def part(self, chosen: Sequence[bool]) -> Figure:
        """Give the figure of some of the items."""
        kept = [i for i, wanted in enumerate(chosen) if wanted]
        return Figure(
            [self.numerators[i] for i in kept],
            [self.denominators[i] for i in kept],
            [self.groups[i] for i in kept],
        )


@dataclass(frozen=True)
class Compared:
    """A figure beside that of a reference, with 95 % intervals of the paired bootstrap."""

    ratio: float
    ratio_interval: Interval
    difference: float
    difference_interval: Interval


def compare(now: Figure, reference: Figure, draws: int = 1000, seed: int = 0) -> Compared:
    """Compare figures of the same items; every draw has the same groups for both."""
    pairs = list(zip(now.drawn(draws, seed), reference.drawn(draws, seed), strict=True))
    return Compared(
        _ratio(now.value, reference.value),
        _percentiles([_ratio(a, b) for a, b in pairs]),
        now.value - reference.value,
        _percentiles([a - b for a, b in pairs]),
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _percentiles(values: Sequence[float]) -> Interval:
    ranked = sorted(v for v in values if not math.isnan(v))
    if not ranked:
        return math.nan, math.nan
    return ranked[int(0.025 * len(ranked))], ranked[math.ceil(0.975 * len(ranked)) - 1]


def _draws(groups: Sequence[str], draws: int, seed: int) -> list[list[int]]:
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    names, drawn = list(members), random.Random(seed)
    if not names:
        return []
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

    `lost` has a value for each of `seeds`, `recovered` for each seed that lost a tenth, and
    `control` for those of them that it ran with: without any, `remedy` is not held to be kept.
    """

    gain: bool
    paradox: bool | None
    remedy: bool | None
    seeds: list[int]
    lost: dict[str, list[float]]
    recovered: dict[str, list[float]]
    control: dict[str, list[float]]


Runs = Mapping[int, Mapping[str, float]]  # the figures of an arm, by seed


def judge(
    base: Mapping[str, float], par: Runs, mix: Runs, abilities: Sequence[str], control: Runs
) -> Judged:
    """Judge the promises P1 to P3 from the figures of the base and of runs with the same seeds.

    P1: `par` and `mix` lower the translation loss by 5 % or more. P2: `par` loses a tenth or more
    of at least two abilities, and its loss as a language model rises by 2 % or more, in at least
    two thirds of the seeds. P3: `mix` recovers at least half of each of those losses, on average
    over these seeds, more than `control` does, and its translation loss is within 1 % of `par`'s.
    """
    seeds = [seed for seed in par if seed in mix]
    gain = all(
        runs[seed]["translation"] <= 0.95 * base["translation"]
        for runs in (par, mix)
        for seed in seeds
    )
    lost = {name: {s: loss(base[name], par[s][name]) for s in seeds} for name in abilities}
    shown = {name: list(values.values()) for name, values in lost.items()}
    forgetful = [
        seed
        for seed in seeds
        if sum(lost[name][seed] >= 0.1 for name in abilities) >= 2
        and par[seed]["lm"] >= 1.02 * base["lm"]
    ]
    paradox = len(forgetful) >= 2 * len(seeds) / 3 if len(abilities) >= 2 else None
    if not paradox:
        return Judged(gain, paradox, None, seeds, shown, {}, {})
    forgot = {name: [s for s in forgetful if lost[name][s] >= 0.1] for name in abilities}
    forgot = {name: found for name, found in forgot.items() if found} | {"lm": forgetful}

    def recovery(runs: Runs, name: str) -> dict[int, float]:
        return {
            s: (runs[s][name] - par[s][name]) / (base[name] - par[s][name])
            for s in forgot[name]
            if s in runs
        }

    recovered = {name: recovery(mix, name) for name in forgot}
    by_control = {name: recovery(control, name) for name in forgot}
    remedy: bool | None = (
        all(mix[s]["translation"] <= 1.01 * par[s]["translation"] for s in seeds)
        and all(fmean(values.values()) >= 0.5 for values in recovered.values())
        and all(
            fmean(recovered[name][s] for s in values) > fmean(values.values())
            for name, values in by_control.items()
            if values
        )
    )
    if remedy and not all(by_control.values()):
        remedy = None
    return Judged(
        gain,
        True,
        remedy,
        seeds,
        shown,
        {name: list(values.values()) for name, values in recovered.items()},
        {name: list(values.values()) for name, values in by_control.items() if values},
    )
