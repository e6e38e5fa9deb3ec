"""Results as a table of runs and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes_peft import report


def table(file: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as CSV."""
    text = io.StringIO()
    lines = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    report.write(file, text.getvalue().encode())


LEFT_OUT = {
    "test": "pairs and lines of the test are not measured: they are longer than --max-length",
    "pairs": "pairs to learn from are left out: they are longer than --max-length",
    "texts": "lines are left out of the texts: they stand in the test or in the pairs",
}


def left_out(test: int, found: Any) -> dict[str, int]:
    """Show what could not be used, if anything; give how much, of runs the most."""
    runs = [run for runs in found.values() for run in runs.values()]
    counts = {
        "test": test,
        "pairs": max(run["left_out"] for run in runs),
        "texts": max((run["first"]["left_out"] for run in runs if run["first"]), default=0),
    }
    for what, count in counts.items():
        if count:
            print(f"{count:,} {LEFT_OUT[what]}")
    return counts


def row(name: str, seed: int, run: Any) -> dict[str, str]:
    translations = run["translations"].values()
    comet = [t["comet"] for t in translations if "comet" in t]
    return {
        "run": name,
        "seed": str(seed),
        "steps": f"{(run['first'] or {}).get('steps', 0)} + {run['steps']}",
        "trained": f"{run['trained_parameters']:,}",
        "bits/char": f"{mean(run['bits'].values()):.3f}",
        "chrF++": f"{mean(t['chrf'] for t in translations):.1f}",
        "BLEU": f"{mean(t['bleu'] for t in translations):.1f}",
        **({"COMET": f"{mean(comet):.4f}"} if comet else {}),
        "at cap": f"{mean(t['at_cap'] for t in translations):.0%}",
        "other language": f"{mean(t['off_target'] for t in translations):.0%}",
    }


def draw(file: Path, found: Any) -> None:
    """Draw the bits per character of every run, by direction; a dot is a seed."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, runs) in enumerate(found.items()):
        for j, direction in enumerate(next(iter(runs.values()))["bits"]):
            values = [run["bits"][direction] for run in runs.values()]
            label = direction if i == 0 else None
            axes.plot([name] * len(values), values, f"C{j}o", alpha=0.7, label=label)
    axes.set(ylabel="bits per character of the references")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    report.write(file, image.getvalue())
