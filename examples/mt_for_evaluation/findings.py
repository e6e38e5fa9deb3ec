"""What the answers say on the three questions, and which of the promises were kept.

A promise is None where it was not measured: a translator was missing, or another task was run.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from agreement import Marks, accuracy, agreement, bootstrap, mcnemar
from language_table import CLASSES, Language
from measuring import Answers
from representativeness import overestimation, permutation_test

__all__ = ["compare_classes", "compare_sides", "permuted", "promises", "scores"]

PAIRS = ("spa", "cat", "glg", "epo", "hrv", "bos_latn", "por_BR")
LARGE = ("encoder", "lm", "road", "lora", "full")
SIMPLE = ("bow", "ngram-regression")
Runs = Mapping[str, Sequence[Answers]]  # by arm, for each seed


def scores(runs: Sequence[Answers], side: str) -> dict[str, float]:
    """Give accuracies by language, the mean over seeds."""
    languages = runs[0][side]
    return {code: statistics.mean(accuracy(run[side][code]) for run in runs) for code in languages}


def compare_sides(
    runs: Runs, reports: Mapping[str, Mapping[str, Any]], draws: int, seed: int
) -> dict[str, Any]:
    """Question 1, for each arm: agreement over languages, intervals, and McNemar by language.

    Accuracies are means over seeds; intervals and items are those of the first seed.
    """
    quality = {c: r["quality"]["chrf"] for c, r in reports.items() if r["quality"]}
    found = {}
    for arm, answers in runs.items():
        human, machine = (scores(answers, side) for side in ("human", "machine"))
        both = sorted(set(human) & set(machine))
        if not both:
            continue
        first = {side: {c: answers[0][side][c] for c in both} for side in ("human", "machine")}
        sides = ({c: human[c] for c in both}, {c: machine[c] for c in both})
        found[arm] = {
            **agreement(*sides, quality),
            "intervals": bootstrap(first["human"], first["machine"], draws, seed),
            "d": {c: machine[c] - human[c] for c in both},
            "items": {c: mcnemar(first["human"][c], first["machine"][c]) for c in both},
        }
    return found


def compare_classes(
    runs: Runs,
    languages: Mapping[str, Language],
    official: Sequence[str],
    side: str,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Questions 2 and 3: means by class of language, O, and what each arm leads or loses by class.

    Only `languages` count, whatever others have scores. `low+unseen` takes two classes as one.
    `lead` is that of the first of `LARGE` over the first of `SIMPLE` that were run; `lost` is what
    quantisation costs.
    """
    classes = {name: (name,) for name in CLASSES} | {"low+unseen": ("low", "unseen")}
    by_arm = {
        arm: {c: v for c, v in scores(answers, side).items() if c in languages}
        for arm, answers in runs.items()
    }
    means: dict[str, Any] = {}
    o: dict[str, Any] = {}
    for arm, values in by_arm.items():
        inside = {
            name: {c: v for c, v in values.items() if languages[c].resource in parts}
            for name, parts in classes.items()
        }
        means[arm] = {n: statistics.mean(v.values()) for n, v in inside.items() if v}
        o[arm] = {n: overestimation(v, official, draws, seed) for n, v in inside.items()}
    found: dict[str, Any] = {"means": means, "o": o, "lead": None, "lost": {}}
    large = next((arm for arm in LARGE if arm in by_arm), None)
    simple = next((arm for arm in SIMPLE if arm in by_arm), None)
    if large and simple:
        lead = {c: by_arm[large][c] - by_arm[simple][c] for c in by_arm[large]}
        unseen = [v for c, v in lead.items() if languages[c].resource == "unseen"]
        seen = [v for c, v in lead.items() if languages[c].resource != "unseen"]
        if test := permutation_test(unseen, seen, draws, seed):
            found["lead"] = {"of": large, "over": simple, **test}
    for arm, values in by_arm.items():
        base = by_arm.get(arm.partition("-apiq")[0])
        if base is None or "-apiq" not in arm:
            continue
        lost = {c: base[c] - values[c] for c in values}
        parts = [[v for c, v in lost.items() if languages[c].resource == n] for n in CLASSES]
        found["lost"][arm] = {
            **{n: statistics.mean(v) for n, v in zip(CLASSES, parts, strict=True) if v},
            "low above high": permutation_test(parts[0], parts[1], draws, seed),
        }
    return found


def permuted(marks: Mapping[str, Marks], labels: Mapping[str, int], seed: int) -> dict[str, float]:
    """Give accuracy when labels are dealt anew among the rows, and the chance level sum of p^2.

    The mean over languages, each with 100 deals.
    """
    chance, found, level = random.Random(seed), [], []
    for rows in marks.values():
        own = [labels[key] for key in rows]
        said = [mark.predicted for mark in rows.values()]
        for _ in range(100):
            chance.shuffle(own)
            found.append(sum(a == b for a, b in zip(said, own, strict=True)) / len(own))
        level.append(sum(n * n for n in Counter(own).values()) / len(own) ** 2)
    return {"accuracy": statistics.mean(found), "chance": statistics.mean(level)}


def promises(
    real: bool,
    sides: Mapping[str, Any],
    reports: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, Any],
    control: Mapping[str, float] | None,
) -> dict[str, bool | None]:
    """Say which promises were kept, refused or not measured; with `real` data."""
    kept: dict[str, bool | None] = {}
    d = sides.get("encoder", {}).get("d", {})
    here = real and all(code in d for code in PAIRS)
    size = [abs(d[code]) for code in PAIRS] if here else []
    kept["encoder: mean |D| at most .05 over the 7 pairs"] = (
        statistics.mean(size) <= 0.05 if here else None
    )
    kept["encoder: max |D| at most .10 over the 7 pairs"] = max(size) <= 0.10 if here else None
    bow = sides.get("bow", {}).get("d", {})
    for code in ("hrv", "bos_latn"):
        there = real and code in bow and code in reports
        kept[f"{code}: D of bow at least .5, and the copy rate is flagged"] = (
            bow[code] >= 0.5 and reports[code]["flagged"] if there else None
        )
    kept["por_BR: the copy rate is not flagged"] = (
        not reports["por_BR"]["flagged"] if real and "por_BR" in reports else None
    )
    o = classes["o"].get("encoder", {}) if real else {}
    high, low = o.get("high"), o.get("low+unseen")
    kept["encoder: |O| of high at most .05"] = abs(high["o"]) <= 0.05 if high else None
    kept["encoder: O of low and unseen at least .20, its interval above 0"] = (
        low["o"] >= 0.20 and low["interval"][0] > 0 if low else None
    )
    kept["encoder: official low-resource languages above the 90th percentile"] = (
        low["percentile"] > 90 if low else None
    )
    lead = classes["lead"] if real else None
    if lead and (lead["of"], lead["over"]) != ("encoder", "bow"):
        lead = None
    kept["the lead over bow is smaller on unseen languages, p < .05"] = (
        lead["difference"] > 0 and lead["p"] < 0.05 if lead else None
    )
    for arm, lost in classes["lost"].items():
        test = lost["low above high"] if real else None
        kept[f"{arm}: low-resource languages lose more than high, p < .05"] = (
            test["difference"] > 0 and test["p"] < 0.05 if test else None
        )
    kept["permuted labels give chance, to .05"] = (
        abs(control["accuracy"] - control["chance"]) <= 0.05 if control else None
    )
    return kept
