"""Show results and keep them: a table on the screen, curves as PNG and CSV, everything as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes_peft.loop import Point, Result

__all__ = ["before_after", "compare", "curves", "perplexity", "show", "write", "write_json"]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns of numbers are aligned to the right."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for i, column in enumerate(columns):
        number = all(re.fullmatch(r"[\d.,]+%?|", row[i]) for row in rows)
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def compare(title: str, results: Mapping[str, Result]) -> None:
    """Print a table with a row for each model."""
    columns = ["", "trained", "held-out loss", "perplexity", "exact match", "training, s"]
    rows = [
        [
            name,
            f"{result.trained_parameters:,}",
            f"{result.held_out_loss:.3f}",
            f"{perplexity(result.held_out_loss):.2f}",
            "" if result.exact_match is None else f"{result.exact_match:.1%}",
            f"{result.seconds:.0f}",
        ]
        for name, result in results.items()
    ]
    show(title, columns, rows)


def before_after(
    title: str,
    results: Mapping[str, tuple[Result, Result]],
    more: Mapping[str, Mapping[str, float]],
) -> None:
    """Print a row for each run, with `more` where it is known: before training and after it."""
    known = list(dict.fromkeys(key for values in more.values() for key in values))
    scored = any(r.exact_match is not None for pair in results.values() for r in pair)
    columns = ["", *known, "perplexity", "after", *(["right", "after"] if scored else [])]
    rows = []
    for name, pair in results.items():
        values = [f"{more[name][key]:.2f}" if name in more else "" for key in known]
        values += [f"{perplexity(result.held_out_loss):,.2f}" for result in pair]
        values += [f"{r.exact_match:.1%}" for r in pair if r.exact_match is not None]
        rows.append([name, *values, *(f"{result.seconds / 60:.1f}" for result in pair)])
    show(title, [*columns, "start, min", "train, min"], rows)


def perplexity(loss: float) -> float:
    """Give e to the loss, infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def write(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(content)
    scratch.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON document."""
    write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def curves(
    folder: Path,
    base: float | Mapping[str, float],
    runs: Mapping[str, Sequence[Point]],
) -> None:
    """Write `curves.csv` and, from the same points, `curves.png`.

    `base` is the held-out loss untrained, of all runs or of each.
    """
    starts = base if isinstance(base, Mapping) else dict.fromkeys(runs, base)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["run", "step", "seconds", "train_loss", "held_out_loss"])
    for name, points in runs.items():
        if isinstance(base, Mapping):
            rows.writerow([name, 0, 0.0, "", starts[name]])
        rows.writerows([name, p.step, p.seconds, p.train_loss, p.held_out_loss] for p in points)
    write(folder / "curves.csv", text.getvalue().encode())

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if not isinstance(base, Mapping):
        axes.axhline(base, color="gray", linestyle=":", label=f"base, held-out ({base:.2f})")
    for i, (name, points) in enumerate(runs.items()):
        steps, colour = [p.step for p in points], f"C{i}"
        axes.plot(steps, [p.train_loss for p in points], f"{colour}--", label=f"{name}, training")
        axes.plot(
            [0, *steps],
            [starts[name], *(p.held_out_loss for p in points)],
            f"{colour}o-",
            label=f"{name}, held-out ({points[-1].held_out_loss:.2f})",
        )
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write(folder / "curves.png", image.getvalue())
