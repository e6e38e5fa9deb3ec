"""What is shown and written: tables, what was promised, scores as CSV, accuracy by position."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from samples import TASKS
from verifier import Report

from recipes_peft import report

__all__ = ["draw", "promised", "show", "show_oracles", "show_own", "write_tables"]

LOGITS = 1e-4  # of the largest: how far a mixed batch may be from one adapter at a time, in float32
_HEADER = (
    "arm", "set", "samples", "S", "S, 95 %", "I", "D", "robust S", "well-formed %", "consistency",
    "lucky", "characters",
)  # fmt: skip
_SHOWN = ("arm", "set", "S", "I", "D", "well-formed %", "characters")


def stages(arms: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give the reports of each arm; of one that was measured before training too, both."""
    for name, found in arms.items():
        if "before" in found:
            yield f"{name}, not trained", found["before"]
        yield name, found["reports"]


def promised(held: Mapping[str, Any], arms: Mapping[str, Any], dtype: str) -> dict[str, bool]:
    """Say whether criterion 5 is met, and whether mixed batches agree with single adapters."""
    kept = {}
    if len(held) > 1:
        base, tuned = held["base"], [found for name, found in held.items() if name != "base"]
        kept["5 RoAd lowers the held-out loss by 20 % or more, in every order of the data"] = all(
            found["loss"] <= 0.8 * base["loss"] for found in tuned
        )
        kept["5 well-formed answers rise by 20 points or are 95 % or more, in every order"] = all(
            found["well_formed"] >= min(0.95, round(base["well_formed"] + 0.20, 9))
            for found in tuned
        )
    if "tasks" in arms:
        mixed, limit = arms["tasks"]["mixed"], LOGITS if dtype == "float32" else 5e-2
        kept["a mixed batch answers as one adapter at a time"] = bool(
            mixed["same"] and mixed["logits"] <= limit
        )
    return kept


def show_oracles(table: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Print sample accuracy, instruction accuracy and depth of the responders."""
    tasks = list(next(iter(table.values())))
    rows = [
        [
            name,
            *(
                f"{row[t]['sample_accuracy']:.1f} / {row[t]['instruction_accuracy']:.2f}"
                f" / {row[t]['depth']:.3f}"
                for t in tasks
            ),
        ]
        for name, row in table.items()
    ]
    report.show(f"{title}: S / I / D", ["", *tasks], rows)


def show_own(own: Mapping[str, Any]) -> None:
    """Print the responders on the user's files, and what of these is not judged or not measured."""
    show_oracles(own["oracles"], "the same, --data")
    for task in own["oracles"]["empty"]:
        if task not in own["official"]:
            print(f"{task} of --data is not the official file: no promise is judged on it")
    if own["unreadable"]:
        print(
            f"text_modification of --data: {own['unreadable']} samples have a step that is no edit"
            " with its words in double quotes; strength and propagation are without them"
        )


def show(arms: Mapping[str, Any], title: str) -> None:
    """Print a row for each arm and set; what a screen has no room for is in `scores.csv`."""
    shown = [_HEADER.index(name) for name in _SHOWN]
    report.show(title, _SHOWN, [[row[i] for i in shown] for row in _rows(arms)])


def _rows(arms: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, sets in stages(arms):
        for test, found in sets.items():
            strict, robust = found["strict"], found["robust"]
            low, high = strict["sample_interval"]
            shares = [strict["consistency"], strict["lucky"]]
            yield [
                name,
                test,
                str(strict["samples"]),
                f"{strict['sample_accuracy']:.2f}",
                f"{low:.0f} to {high:.0f}",
                f"{strict['instruction_accuracy']:.2f}",
                f"{strict['depth']:.2f}",
                f"{robust['sample_accuracy']:.2f}",
                f"{found['well_formed']:.1f}",
                *("" if share is None else f"{share:.1f}" for share in shares),
                f"{strict['length']:.0f}",
            ]


def write_tables(folder: Path, arms: Mapping[str, Any]) -> None:
    """Write `scores.csv` and `positions.csv`."""
    _csv(folder / "scores.csv", list(_HEADER), list(_rows(arms)))
    rows = [
        [name, test, mode, str(position), f"{value:.2f}"]
        for name, sets in stages(arms)
        for test, found in sets.items()
        for mode in ("strict", "robust")
        for position, value in enumerate(found[mode]["positions"], 1)
    ]
    _csv(folder / "positions.csv", ["arm", "set", "mode", "position", "accuracy"], rows)


def _csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    report.write(path, text.getvalue().encode())


def draw(path: Path, arms: Mapping[str, Any]) -> None:
    """Draw accuracy by position on generated chains, a panel for each task; revisions dashed."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    colours = colormaps["tab20"]
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, task in zip(panels, TASKS, strict=True):
        for i, (name, sets) in enumerate(stages(arms)):
            if task not in sets:
                continue
            curves = Report(**sets[task]["strict"]).curves(task)
            for points, line in zip(curves.values(), ("o-", "s--"), strict=False):
                label = name if line == "o-" else None
                axes.plot(
                    list(points), list(points.values()), line, color=colours(i % 20), label=label
                )
        axes.set(title=task.replace("_", " "), xlabel="position of the step", ylim=(-3, 103))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("right, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    report.write(path, image.getvalue())
