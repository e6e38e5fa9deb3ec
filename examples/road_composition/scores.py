"""From answers to a verdict: rates with intervals, the questions, a table, CSV and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skills import Task

from recipes_peft import report
from recipes_peft.data import Example

# 97.5 % points of Student's t for 1 to 9 degrees of freedom; the last serves for more, too wide
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Rates = dict[str, float]  # of answers that show a skill, by its name, and "both"
Found = Mapping[str, Mapping[str, Sequence[Rates]]]  # arm: what was switched on: one for each seed


class Interval(NamedTuple):
    """A mean over seeds and the half width of its 95 % interval, None for a single seed."""

    mean: float
    half: float | None

    @property
    def positive(self) -> bool:
        """Tell whether the whole interval is above zero; never so for a single seed."""
        return self.half is not None and self.mean - self.half > 0

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Give the mean and Student's 95 % interval: mean ± t s / sqrt(n)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    t = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return Interval(mean, t * statistics.stdev(values) / len(values) ** 0.5)


def rates(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> Rates:
    """Give the share of answers that show each skill, and that of those that show both."""
    shown = [
        [skill.shows(text, example) for skill in task.skills.values()]
        for example, text in zip(examples, texts, strict=True)
    ]
    columns = dict(zip(task.skills, zip(*shown, strict=True), strict=True))
    columns["both"] = tuple(map(all, shown))
    return {name: sum(column) / len(column) for name, column in columns.items()}


def questions(found: Found, first: str, second: str) -> dict[str, tuple[bool, str]]:
    """Answer the questions of the README that the arms at hand can answer, and say by what."""
    if "halves" not in found:
        return {}
    ours = found["halves"]

    def of(arm: str, choice: str, metric: str) -> list[float]:
        return [rates[metric] for rates in found[arm][choice]]

    def minus(some: Sequence[float], others: Sequence[float]) -> Interval:
        return interval([a - b for a, b in zip(some, others, strict=True)])

    together = of("halves", "both", "both")
    others = [of("halves", choice, "both") for choice in ours if choice != "both"]
    best = [max(seed) for seed in zip(*others, strict=True)]
    answers: dict[str, tuple[bool, str]] = {}
    for own, other in ((first, second), (second, first)):
        gain = minus(of("halves", own, own), of("halves", "none", own))
        leak = minus(of("halves", own, other), of("halves", "none", other))
        answers[f"the half for {own} shows {own} more often than the base"] = (
            gain.positive,
            str(gain),
        )
        answers[f"it shows {other} at most 10 points more often than the base"] = (
            leak.mean <= 0.1,
            str(leak),
        )
    gain = minus(together, best)
    text = "both halves show both skills more often than either half or the base"
    answers[text] = gain.positive, str(gain)
    if "joint" in found:
        half = [rate / 2 for rate in of("joint", "both", "both")]
        above = minus(together, half)
        answers["both halves reach half of joint training's rate"] = above.mean >= 0, str(above)
    for arm, what in (("loreft", "LoReFT's subspaces"), ("multiplied", "two adapters multiplied")):
        if arm in found:
            above = minus(together, of(arm, "both", "both"))
            answers[f"both halves do better than {what}"] = above.positive, str(above)
    return answers


def show(title: str, found: Found) -> None:
    """Print a row for each arm and choice: every rate with its interval."""
    columns = ["", "switched on", *next(iter(next(iter(found.values())).values()))[0]]
    rows = [
        [arm, choice, *(str(interval([rates[m] for rates in seeds])) for m in columns[2:])]
        for arm, choices in found.items()
        for choice, seeds in choices.items()
    ]
    report.show(title, columns, rows)


def show_answers(
    examples: Sequence[Example], texts: Mapping[str, Mapping[str, Sequence[str]]]
) -> None:
    """Print what was written to each example, by arm and by what was switched on."""
    for i, example in enumerate(examples):
        rows = [
            [arm, choice, written[i]]
            for arm, choices in texts.items()
            for choice, written in choices.items()
        ]
        report.show(example.prompt[-200:], ["", "switched on", "answer"], rows)


def write(folder: Path, name: str, found: Found) -> None:
    """Write `<name>.csv`, a row for each arm, choice and seed, and `<name>.png` of the same."""
    metrics = list(next(iter(next(iter(found.values())).values()))[0])
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["arm", "switched_on", "run", *metrics])
    bars: dict[str, list[Rates]] = {}
    for arm, choices in found.items():
        for choice, seeds in choices.items():
            bars[f"{arm}\n{choice}"] = list(seeds)
            for run, values in enumerate(seeds):
                table.writerow([arm, choice, run, *(values[m] for m in metrics)])
    report.write(folder / f"{name}.csv", text.getvalue().encode())

    figure = Figure(figsize=(1.5 + 0.9 * len(bars), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    width = 0.8 / len(metrics)
    for i, metric in enumerate(metrics):
        places = [place + (i - 1) * width for place in range(len(bars))]
        values = [[rates[metric] for rates in seeds] for seeds in bars.values()]
        means = [interval(v) for v in values]
        errors = [m.half or 0.0 for m in means]
        axes.bar(places, [m.mean for m in means], width, yerr=errors, label=metric, alpha=0.7)
        for place, dots in zip(places, values, strict=True):
            axes.plot([place] * len(dots), dots, "k.", markersize=3)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set(ylabel="share of answers", ylim=(0, 1.05))
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    report.write(folder / f"{name}.png", image.getvalue())
