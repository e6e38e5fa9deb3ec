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

__all__ = ["compare", "curves", "perplexity", "show", "write", "write_json"]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns of numbers are aligned to the right."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for i, column in enumerate(columns):
        number = all(re.fullmatch(r"[\d.,]+%?", row[i]) for row in rows)
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
            f"{result.exact_match:.1%}",
            f"{result.seconds:.0f}",
        ]
        for name, result in results.items()
    ]
    show(title, columns, rows)


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


def curves(folder: Path, base: float, runs: Mapping[str, Sequence[Point]]) -> None:
    """Write `curves.csv` and, from the same points, `curves.png`; `base` is the loss untrained."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["run", "step", "seconds", "train_loss", "held_out_loss"])
    for name, points in runs.items():
        rows.writerows([name, p.step, p.seconds, p.train_loss, p.held_out_loss] for p in points)
    write(folder / "curves.csv", text.getvalue().encode())

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(base, color="gray", linestyle=":", label=f"base, held-out ({base:.2f})")
    for i, (name, points) in enumerate(runs.items()):
        steps, colour = [p.step for p in points], f"C{i}"
        axes.plot(steps, [p.train_loss for p in points], f"{colour}--", label=f"{name}, training")
        axes.plot(
            [0, *steps],
            [base, *(p.held_out_loss for p in points)],
            f"{colour}o-",
            label=f"{name}, held-out ({points[-1].held_out_loss:.2f})",
        )
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss per token of the answer (nats)")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write(folder / "curves.png", image.getvalue())
