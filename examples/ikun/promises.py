"""What was promised before the run, decided from the numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

import health

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by run and seed

RATIO_FALL, ENGLISH_CHANGE, LOGITS = 0.25, 0.01, 1e-5
TEXT_FALL, ENGLISH_RISE = 0.05, 0.03
GAIN, SEEDS = 0.02, 2 / 3
LENGTH, OFF_TARGET = 0.15, 0.02
# runs of two stages, the first that there is being judged: what it is compared with, the second
# with as many steps as both stages
TWO_STAGES = {
    "C": ("S", "S+"),
    "C-full": ("S-full", "S+-full"),
    "CV-full": ("S-full", "S+-full"),
    "CV": ("S", "S+"),
}
MERGED = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest logit


def vocabulary(checks: Mapping[str, Any]) -> dict[str, bool]:
    """A1: fewer tokens for the languages, the same for English, nothing lost, nothing moved."""
    before, after = (
        mean(v for n, v in checks[part].items() if n != "en") for part in ("ratios", "new_ratios")
    )
    english = checks["new_english_tokens"] / checks["english_tokens"] - 1
    return {
        "A1 length ratios fall by a quarter or more": after <= (1 - RATIO_FALL) * before,
        "A1 English takes the same tokens, to 1 %": abs(english) <= ENGLISH_CHANGE,
        "A1 all text comes back from its tokens": bool(checks["lossless"]),
        "A1 logits of the base's tokens are unchanged": checks["logit_change"] <= LOGITS,
    }


def texts(base: Mapping[str, float], found: Found) -> dict[str, bool]:
    """A2: after the first stage each language is easier per character, English hardly harder."""
    kept = {}
    for name in ("C", "CV"):
        stages = [run["first"]["texts"] for run in found.get(name, {}).values()]
        if not stages:
            continue
        change = {n: mean(stage[n] for stage in stages) / bits - 1 for n, bits in base.items()}
        others = [value for language, value in change.items() if language != "en"]
        kept[f"A2 {name}: every other language falls by 5 %"] = max(others) <= -TEXT_FALL
        if "en" in change:
            kept[f"A2 {name}: English rises by 3 % at most"] = change["en"] <= ENGLISH_RISE
    return kept


def judged(found: Found) -> str | None:
    """Name the run whose two stages are judged: C, or what stands in its place."""
    return next((name for name in TWO_STAGES if name in found), None)


def two_stages(found: Found) -> dict[str, bool | None]:
    """A3: the first stage helps translation, and more than as many further steps of the second.

    What cannot be judged is None, and its name says which run is missing.
    """
    name = judged(found)
    if name is None:
        return {f"A3 is not judged: there is no run {', '.join(TWO_STAGES)}": None}
    kept: dict[str, bool | None] = {}
    for other in TWO_STAGES[name]:
        promise = f"A3 {name} below {other} by 2 % in two of three seeds"
        seeds = sorted(set(found[name]) & set(found.get(other, ())))
        wins = [_bits(found[name][s]) <= (1 - GAIN) * _bits(found[other][s]) for s in seeds]
        if wins:
            kept[promise] = sum(wins) >= SEEDS * len(wins) - 1e-9
        else:
            kept[f"{promise}: there is no run {other}"] = None
    promise = f"A3 chrF of {name} is that of {other} or better"
    if seeds:
        chrf = {run: mean(_chrf(found[run][seed]) for seed in seeds) for run in (name, other)}
        kept[promise] = chrf[name] >= chrf[other]
    else:
        kept[f"{promise}: there is no run {other}"] = None
    return kept


def healthy(found: Found, off_target: bool) -> dict[str, bool | None]:
    """A4: outputs are as long as references in every bucket; on large models, in language."""
    name = judged(found)
    if name is None:
        return {f"A4 is not judged: there is no run {', '.join(TWO_STAGES)}": None}
    runs, which = list(found[name].values()), "A4" if name == "C" else f"A4 {name}:"
    kept: dict[str, bool | None] = {
        f"{which} lengths within 15 % of the references' in every bucket": all(
            abs(bucket.off) <= LENGTH for bucket in buckets(runs)
        )
    }
    if off_target:
        shares = [t["off_target"] for run in runs for t in run["translations"].values()]
        kept[f"{which} 2 % or fewer in another language"] = mean(shares) <= OFF_TARGET
    return kept


def merges(found: Found, dtype: str) -> dict[str, bool]:
    """Merging an adapter changes no logit by more than rounding does."""
    moved = max(run["merge_difference"] for runs in found.values() for run in runs.values())
    return {f"merging moves no logit by more than {MERGED[dtype]:g}": moved <= MERGED[dtype]}


def buckets(runs: Any) -> list[health.Bucket]:
    """Give the lengths of all translations of these runs, by length of the source."""
    rows = [t for run in runs for t in run["translations"].values()]
    sides = ([line for t in rows for line in t[k]] for k in ("sources", "outputs", "references"))
    return health.length_health(*sides)


def _bits(run: Mapping[str, Any]) -> float:
    return mean(run["bits"].values())


def _chrf(run: Mapping[str, Any]) -> float:
    return mean(t["chrf"] for t in run["translations"].values())
