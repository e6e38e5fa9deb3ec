"""Tables, what was promised, files of all numbers, and heat maps of the grids."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import analysis
import grid
import torch
from grid import Cells, Scores
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from parallel_pairs import ParallelPairs
from prepare import Data
from settings import Settings

from recipes_peft import report
from recipes_peft.loop import Point

__all__ = ["present", "promises"]

CHECKS = ("oracle", "constant")  # of the grid's code: no rows of the table
SHORTCUTS = ("overlap", "proximity")


def present(
    given: Settings,
    out: Path,
    data: Data,
    task: Any,
    found: Mapping[str, Sequence[dict[str, Any]]],
    cells: Mapping[str, Sequence[Cells]],
) -> None:
    """Show the tables and whether promises were kept; write everything to the folder.

    `found` and `cells` have an entry for each seed, by arm, baseline or check.
    """
    main = next(iter(task.metrics))
    scores = {
        arm: {
            about.get("seed", 0): grid.scored(c, data.test, task.metrics[main])
            for about, c in zip(found[arm], several, strict=True)
        }
        for arm, several in cells.items()
    }
    pooled = {arm: analysis.sum_of(list(seeds.values())) for arm, seeds in scores.items()}
    gaps = {arm: analysis.interval([s], given.bootstrap) for arm, s in pooled.items()}
    differences = analysis.differences(scores, given.bootstrap)
    analysed = {
        arm: [analysis.analyse(c, data, task, given.task) for c in several]
        for arm, several in cells.items()
    }
    table(given, data, main, found, analysed, gaps)
    by_language(main, data.test.languages, pooled)
    compare(main, differences)
    kept = promises(given, data, pooled, gaps, found, main)
    for promise, met in kept.items():
        print(f"{'yes' if met else 'NO '}  {promise}")
    report.write_json(
        out / "results.json",
        {
            "settings": asdict(given),
            "rows": {"train": len(data.train), "held_out": len(data.held_out)},
            "test_rows": len(data.test),
            "conflicts": conflicts(data.test),
            "scripts": analysis.scripts(data),
            "promises": kept,
            "gap_95": gaps,
            "differences": differences,
            "arms": {
                arm: [{**a, **b} for a, b in zip(found[arm], analysed[arm], strict=True)]
                for arm in found
            },
        },
    )
    write_grid(out / "grid.csv", analysed)
    heat_maps(out / "grid.png", main, pooled)
    first = {arm: runs[0] for arm, runs in found.items() if "curve" in runs[0]}
    if first:
        curves = {arm: [Point(**point) for point in run["curve"]] for arm, run in first.items()}
        report.curves(out, {arm: run["untrained_loss"] for arm, run in first.items()}, curves)
    print(f"results.json, grid.csv, grid.png and curves are in {out}")


def conflicts(pairs: ParallelPairs) -> dict[str, int]:
    """Count the rows left out of a cell because its languages disagree about the class."""
    names = pairs.languages
    counts = {
        f"{a}-{b}": pairs.conflicts(a, b) for i, a in enumerate(names) for b in names[i + 1 :]
    }
    return {pair: count for pair, count in counts.items() if count}


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def table(
    given: Settings,
    data: Data,
    main: str,
    found: Mapping[str, Sequence[dict[str, Any]]],
    analysed: Mapping[str, Sequence[dict[str, Any]]],
    gaps: Mapping[str, tuple[float, float]],
) -> None:
    """Show each arm: within, across and gap, and what else of them is one number."""
    rows, more = [], []
    for arm, runs in analysed.items():
        if arm in CHECKS:
            continue
        first, (low, high) = found[arm][0], gaps[arm]
        metrics = [run["metrics"][main] for run in runs]
        means = [_spread([m["means"][k] for m in metrics]) for k in ("within", "across", "gap")]
        trained = f"{first['trained']:,}" if "trained" in first else ""
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append([arm, trained, str(len(runs)), *means, interval])
        known = metrics[0]["by_script"]
        scripts = [
            _spread([m["by_script"][name] for m in metrics]) if name in known else ""
            for name in ("same", "different")
        ]
        hard = [statistics.mean(run["hard"].values()) for run in found[arm] if run["hard"]]
        seconds = [run["seconds"] for run in found[arm] if "seconds" in run]
        spent = f"{statistics.mean(seconds):.0f}" if seconds else ""
        more.append([arm, *scripts, _spread(hard) if hard else "", spent])
    size = f"{len(data.test)} rows, {len(data.test.languages)} languages"
    columns = ["", "trained", "seeds", "within", "across", "gap", "gap, 95 %"]
    report.show(f"{given.task}, {main} in points, {size}", columns, rows)
    columns = ["", "across, one script", "across scripts", "within, hard", "training, s"]
    report.show("across by script; within with negatives of most overlap", columns, more)


def by_language(main: str, languages: Sequence[str], pooled: Mapping[str, Scores]) -> None:
    """Show within and across of each language."""
    rows = []
    for arm, scores in pooled.items():
        if arm not in CHECKS:
            summary = grid.within_across(scores.matrix)
            for name in ("within", "across"):
                values = [f"{100 * v:.1f}" for v in getattr(summary, name).tolist()]
                rows.append([f"{arm}, {name}", *values])
    report.show(f"{main} by language, mean over seeds", ["", *languages], rows)


def compare(main: str, differences: Mapping[str, Mapping[str, Any]]) -> None:
    """Show how far arms are apart, with paired intervals."""
    rows = []
    for pair, values in differences.items():
        cells = [values[of] for of in ("within", "across", "gap")]
        numbers = [
            f"{100 * c['difference']:+.1f} ({100 * c['95'][0]:+.1f} to {100 * c['95'][1]:+.1f})"
            for c in cells
        ]
        rows.append([pair, str(len(values["seeds"])), *numbers])
    if rows:
        columns = ["", "seeds of both", "within", "across", "gap"]
        report.show(f"differences in {main}, points, with 95 % intervals", columns, rows)


def promises(
    given: Settings,
    data: Data,
    pooled: Mapping[str, Scores],
    gaps: Mapping[str, tuple[float, float]],
    found: Mapping[str, Sequence[dict[str, Any]]],
    main: str,
) -> dict[str, bool]:
    """Say what was promised before the run and whether it was kept, of what has run."""
    means = {arm: grid.within_across(s.matrix).means() for arm, s in pooled.items()}
    oracle = pooled["oracle"].matrix
    kept = {"A1: an oracle has 100 in every cell": bool((oracle == 1).all())}
    if given.task == "countries":
        cells = pooled["constant"].matrix
        kept["A1: a constant answer has 50 ± 1 in every cell"] = bool(
            ((cells - 0.5).abs() <= 0.01).all()
        )
    if "overlap" in pooled and data.hard:
        scores, m = pooled["overlap"], means["overlap"]
        written = analysis.scripts(data)
        apart = grid.by_script(scores.matrix, scores.languages, written).get("different")
        kept["A2: overlap has 95 or more within languages"] = m["within"] >= 0.95
        if apart is not None:
            kept["A2: overlap has 55 or less across scripts"] = apart <= 0.55
        kept["A2: overlap has a gap of 35 or more"] = m["gap"] >= 0.35
        hard = statistics.mean(found["overlap"][0]["hard"].values())
        kept["A4: hard negatives lower overlap within languages by 5 or more"] = (
            m["within"] - hard >= 0.05
        )
    if "road" in pooled:
        kept["A3: road has a gap of 10 or more"] = means["road"]["gap"] >= 0.10
        kept["A3: the interval of road's gap is above 0"] = gaps["road"][0] > 0
        base = next(means[name]["across"] for name in SHORTCUTS if name in means)
        kept["A3: road is 10 or more above the shortcut across languages"] = (
            means["road"]["across"] >= base + 0.10
        )
    if any(arm.endswith("+shuffled") for arm in pooled):
        kept["A5: training on shuffled words has run"] = True
    return kept


def write_grid(path: Path, analysed: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write every cell of every arm, seed and metric as a line."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["arm", "seed", "metric", "first", "second", "score"])
    for arm, runs in analysed.items():
        for seed, run in enumerate(runs):
            for metric, values in run["metrics"].items():
                for first, row in zip(run["languages"], values["matrix"], strict=True):
                    for second, score in zip(run["languages"], row, strict=True):
                        lines.writerow([arm, seed, metric, first, second, f"{score:.5f}"])
    report.write(path, text.getvalue().encode())


def heat_maps(path: Path, main: str, pooled: Mapping[str, Scores]) -> None:
    """Draw the grid of each arm, the language of the first segment from top to bottom."""
    drawn = {arm: scores for arm, scores in pooled.items() if arm not in CHECKS}
    size = len(next(iter(drawn.values())).languages)
    side, across = max(3.0, 0.42 * size + 1), min(3, len(drawn))
    down = -(-len(drawn) // across)
    figure = Figure(figsize=(side * across, side * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    lowest = min(float(scores.matrix.min()) for scores in drawn.values())
    for panel, (arm, scores) in zip(panels, drawn.items(), strict=False):
        matrix, means = 100 * scores.matrix, grid.within_across(scores.matrix).means()
        panel.imshow(matrix.numpy(), vmin=100 * lowest, vmax=100, cmap="viridis")
        ticks = range(size)
        panel.set_xticks(ticks, scores.languages, rotation=90, fontsize=7)
        panel.set_yticks(ticks, scores.languages, fontsize=7)
        words = f"{100 * means['within']:.0f} within, {100 * means['across']:.0f} across"
        panel.set_title(f"{arm}: {words}", fontsize=9)
        panel.set(xlabel="second segment", ylabel="first segment")
        middle = 50 * (1 + lowest)
        for p, h in torch.cartesian_prod(torch.arange(size), torch.arange(size)).tolist():
            value = float(matrix[p, h])
            colour = "black" if value > middle else "white"
            panel.text(h, p, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    figure.suptitle(f"{main}, mean over seeds")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    report.write(path, image.getvalue())
