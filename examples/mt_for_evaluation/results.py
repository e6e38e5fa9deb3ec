"""Show what was found, as tables, and write it: JSON, a CSV of every language, and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import findings
from findings import Runs
from language_table import CLASSES, Language
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes_peft import report

__all__ = ["plot", "show", "write_languages"]

ABOUT = ("language", "flores", "script", "family", "gib", "class", "compared")
TROUBLE = ("empty", "copied", "repeated", "looping", "length_outliers", "identical_pairs")
COLUMNS = (*ABOUT, "arm", "human", "machine", "copy_rate", "chrf")  # of languages.csv


def show(found: Mapping[str, Any], chance: float) -> None:
    """Print the tables of the three questions and the promises."""
    if found["translations"]:
        columns = ["translated", "by", "chrF++", "copy rate", "trouble"]
        rows = [
            [
                code,
                r["system"],
                f"{r['quality']['chrf']:.1f}" if r["quality"] else "",
                f"{r['copy_rate']:.3f}",
                ", ".join(f"{r[kind]} {kind.replace('_', ' ')}" for kind in TROUBLE if r[kind]),
            ]
            for code, r in found["translations"].items()
        ]
        report.show("machine translations", columns, rows)
    for code, r in found["translations"].items():
        if r["flagged"]:
            print(
                f"FLAGGED: {code} copies {r['copy_rate']:.0%} of its tokens; scores may be too high"
            )
    for code, why in found["left_out"].items():
        print(f"not translated: {code}: {why}")
    columns = ["arm", "mean D", "95 %", "|D|", "max", "r", "rho", "chrF"]
    rows = [
        [
            arm,
            _signed(r["mean_d"]),
            _interval(r["intervals"].get("mean_d over_both")),
            f"{r['mean_abs_d']:.3f}",
            f"{r['max_abs_d']:.3f}",
            *(_signed(r[k], 2) for k in ("pearson", "spearman", "spearman_abs_d_quality")),
        ]
        for arm, r in found["sides"].items()
    ]
    if rows:
        title = "D: accuracy on machine minus human translation; chrF: rho of |D| and chrF++"
        report.show(title, columns, rows)
    means, o = found["classes"]["means"], found["classes"]["o"]
    rows = [[arm, *(f"{m[n]:.3f}" if n in m else "" for n in CLASSES)] for arm, m in means.items()]
    title = f"accuracy by class of language; always one label: {chance:.3f}"
    report.show(title, ["arm", *CLASSES], rows)
    rows = [
        [
            arm,
            *(_signed(r[n] and r[n]["o"]) for n in ("high", "low", "low+unseen")),
            _interval(r["low+unseen"] and r["low+unseen"]["interval"]),
            f"{r['low+unseen']['percentile']:.0f}" if r["low+unseen"] else "",
        ]
        for arm, r in o.items()
    ]
    columns = ["arm", "high", "low", "low+unseen", "95 %", "percentile"]
    report.show("O: official languages minus all of their class", columns, rows)
    rows = [
        [
            arm,
            *(_signed(lost.get(n)) for n in CLASSES),
            f"{lost['low above high']['p']:.3f}" if lost["low above high"] else "",
        ]
        for arm, lost in found["classes"]["lost"].items()
    ]
    if rows:
        columns = ["arm", *CLASSES, "p, low above high"]
        report.show("accuracy that quantisation loses", columns, rows)
    if lead := found["classes"]["lead"]:
        print(
            f"the lead of {lead['of']} over {lead['over']}, on seen languages minus on unseen ones:"
            f" {lead['difference']:+.3f}, p {lead['p']:.3f}"
        )
    for promise, kept in found["promises"].items():
        print(f"{ {True: 'yes', False: 'NO ', None: ' - '}[kept] }  {promise}")


def write_languages(
    path: Path,
    runs: Runs,
    languages: Mapping[str, Language],
    compared: Collection[str],
    reports: Mapping[str, Any],
) -> None:
    """Write a row for each language and arm; those `compared` are what classes were made of."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for arm, answers in runs.items():
        human, machine = (findings.scores(answers, side) for side in ("human", "machine"))
        for code in sorted({*human, *machine}):
            x, r = languages[code], reports.get(code)
            quality = r["quality"]["chrf"] if r and r["quality"] else ""
            lines.writerow(
                [
                    *(code, x.flores or "", x.script, x.family, x.size, x.resource),
                    *("yes" if code in compared else "no", arm),
                    *(human.get(code, ""), machine.get(code, "")),
                    *(r["copy_rate"] if r else "", quality),
                ]
            )
    report.write(path, text.getvalue().encode())


def plot(
    path: Path, runs: Runs, languages: Mapping[str, Language], side: str, official: Sequence[str]
) -> None:
    """Draw accuracies on both translations against each other, and accuracies by class."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, (arm, answers) in enumerate(runs.items()):
        human, machine = (findings.scores(answers, s) for s in ("human", "machine"))
        both = sorted(set(human) & set(machine))
        left.scatter([human[c] for c in both], [machine[c] for c in both], s=14, label=arm)
        values = human if side == "human" else machine
        for place, name in enumerate(CLASSES):
            inside = sorted(c for c in values if c in languages and languages[c].resource == name)
            x = [place + (number - len(runs) / 2) * 0.8 / len(runs)] * len(inside)
            marks = [30 if c in official else 6 for c in inside]
            right.scatter(x, [values[c] for c in inside], s=marks, color=f"C{number % 10}")
    left.plot([0, 1], [0, 1], color="gray", linestyle=":")
    left.set(xlabel="accuracy, human translation", ylabel="accuracy, machine translation")
    if runs:
        left.legend(fontsize=7)
    right.set_xticks(range(len(CLASSES)), CLASSES)
    right.set(xlabel="class of language (large: official)", ylabel=f"accuracy, {side} translation")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    report.write(path, image.getvalue())


def _signed(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:+.{digits}f}"


def _interval(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{values[0]:+.2f} {values[1]:+.2f}"
