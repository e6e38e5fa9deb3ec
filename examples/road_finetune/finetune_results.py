"""What the cells add up to: means and deviations, promises, tables, a CSV file and a figure."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune_arms import ARMS
from finetune_cells import Cell, Outcome
from glue_protocol import TASKS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes_peft import report

__all__ = ["Results", "averages", "in_points", "promises", "show", "write"]

ROADS = ("road_1", "road_2", "road_4")
# By task and arm, a cell for each seed: that of the learning rate which validation chose.
Results = dict[str, dict[str, list[tuple[Cell, Outcome]]]]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Give the mean and the deviation of a sample, None if it has one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def in_points(found: Sequence[tuple[Cell, Outcome]], of: str = "score") -> str:
    """Write mean and deviation over seeds of an outcome's `score` or `valid`, times 100."""
    mean, deviation = spread([100 * getattr(outcome, of) for _, outcome in found])
    return f"{mean:.1f}" + ("" if deviation is None else f" ({deviation:.1f})")


def averages(results: Results, tasks: Sequence[str]) -> dict[str, float]:
    """Give the average over tasks, in points, of each arm that has run on all of them."""
    arms = results[tasks[0]] if tasks else {}
    return {
        arm: statistics.mean(
            statistics.mean(100 * outcome.score for _, outcome in results[task][arm])
            for task in tasks
        )
        for arm in arms
        if all(arm in results[task] for task in tasks)
    }


def promises(results: Results) -> dict[str, bool]:
    """Say what was promised before the run and whether it was kept, of what has run."""
    kept: dict[str, bool] = {}
    classified = [task for task in results if task in TASKS]
    mean = averages(results, classified)
    if {"road_1", "full"} <= set(mean):
        near = mean["road_1"] >= mean["full"] - 3
        kept["road_1 is at most 3 points below full finetuning on average"] = near
    if {"road_1", "lora"} <= set(mean):
        near = mean["road_1"] >= mean["lora"] - 3
        kept["road_1 is at most 3 points below LoRA on average"] = near
    if "road_1" in mean:
        shares = [results[task]["road_1"][0][1].count.share for task in classified]
        kept["road_1 trains less than 0.1 % of the encoder"] = max(shares) < 0.1
    for task, found in results.items():
        trained = {arm: found[arm][0][1].count.trained for arm in ROADS if arm in found}
        if "road_1" in trained and len(trained) > 1:
            exact = all(n == int(arm[-1]) * trained["road_1"] for arm, n in trained.items())
            kept[f"{task}: road_2 and road_4 train twice and four times as much, exactly"] = exact
        if task in TASKS or not trained:
            continue
        mean = averages(results, [task])
        if "base" in found:
            half = found["base"][0][1].valid_loss / 2
            losses = [outcome.valid_loss for arm in trained for _, outcome in found[arm]]
            kept[f"{task}: each RoAd at least halves the untrained loss"] = max(losses) <= half
        if "lora" in found:
            near = statistics.mean(mean[arm] for arm in trained) >= mean["lora"] - 10
            kept[f"{task}: RoAd's mean is at most 10 points below LoRA"] = near
    return kept


def show(results: Results) -> None:
    """Print a table for each task, and one of averages if there are several to classify."""
    columns = ["", "trained", "%", "head", "rate", "valid", "test", "s"]
    for task, arms in results.items():
        rows = [[arm, *cells_of(found)] for arm, found in arms.items()]
        report.show(f"{task}: points, mean (deviation) over seeds", columns, rows)
        if task not in TASKS:
            show_sets(task, arms)
    classified = [task for task in results if task in TASKS]
    if len(classified) > 1:
        mean = averages(results, classified)
        report.show(
            "average over tasks", ["", "test"], [[arm, f"{m:.1f}"] for arm, m in mean.items()]
        )


def cells_of(found: Sequence[tuple[Cell, Outcome]]) -> list[str]:
    count = found[0][1].count
    rates = sorted({cell.rate * ARMS[cell.arm].rate for cell, _ in found})
    return [
        f"{count.trained:,}",
        f"{count.share:.3f}",
        f"{count.head:,}",
        " ".join(f"{rate:.1e}" for rate in rates) if found[0][1].seconds else "",
        in_points(found, "valid"),
        in_points(found),
        f"{statistics.mean(outcome.seconds for _, outcome in found):.0f}",
    ]


def show_sets(task: str, arms: Mapping[str, Sequence[tuple[Cell, Outcome]]]) -> None:
    """Print the score of each test set, and how often there was an answer of the form asked for."""
    names = list(next(iter(arms.values()))[0][1].test)
    rows = []
    for arm, found in arms.items():
        scores = [statistics.mean(100 * o.test[name] for _, o in found) for name in names]
        answered = statistics.mean(100 * (o.answered or 0.0) for _, o in found)
        rows.append([arm, *(f"{score:.1f}" for score in scores), f"{answered:.1f}"])
    report.show(f"{task}: by test set", ["", *names, "answered"], rows)


def write(out: Path, results: Results, about: Mapping[str, Any]) -> None:
    """Write `results.json` and `results.csv`, and from the same numbers `results.png`."""
    rows = [
        row(cell, outcome)
        for arms in results.values()
        for f in arms.values()
        for cell, outcome in f
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    report.write(out / "results.csv", text.getvalue().encode())
    kept = {
        task: {
            arm: [{**asdict(cell), **asdict(outcome)} for cell, outcome in found]
            for arm, found in arms.items()
        }
        for task, arms in results.items()
    }
    report.write_json(out / "results.json", {**about, "results": kept})
    report.write(out / "results.png", figure(results))


def row(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    count = outcome.count
    return {
        "task": cell.task,
        "arm": cell.arm,
        "seed": cell.seed,
        "learning_rate": cell.rate * ARMS[cell.arm].rate,
        "trained": count.trained,
        "head": count.head,
        "percent": count.share,
        "valid": outcome.valid,
        "test": outcome.score,
        "seconds": outcome.seconds,
    }


def figure(results: Results) -> bytes:
    """Draw the score on the test sets over the parameters trained, a panel for each task."""
    drawn = Figure(figsize=(4.5 * len(results), 4), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(results), squeeze=False)[0]
    for panel, (task, arms) in zip(panels, results.items(), strict=True):
        for number, (arm, found) in enumerate(arms.items()):
            mean, deviation = spread([100 * outcome.score for _, outcome in found])
            trained = found[0][1].count.trained
            if not trained:
                panel.axhline(mean, color="gray", linestyle=":", label=arm)
                continue
            panel.errorbar(
                trained, mean, deviation or 0.0, fmt="o", capsize=3, color=f"C{number}", label=arm
            )
        panel.set_xscale("log")
        panel.set(title=task, xlabel="parameters trained", ylabel="test, points")
        panel.legend(fontsize="small")
    image = io.BytesIO()
    drawn.savefig(image, format="png", dpi=120)
    return image.getvalue()
