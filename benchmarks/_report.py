"""Where measurements go: rows of a CSV, a table, a plot drawn from the CSV, a line of JSON."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._measure import quantiles

_PACKAGES = ("torch", "transformers", "peft", "triton")


@dataclass(frozen=True)
class Row:
    """One figure: a provider on a case, in a mode, at a size x (tokens, or rows of a weight)."""

    case: str
    provider: str
    mode: str
    metric: str
    unit: str
    x: int
    p20: float
    p50: float
    p80: float
    device: str
    versions: str
    commit: str
    date: str


@dataclass(frozen=True)
class Place:
    """Where and with what a run was made; the columns that all its rows share."""

    device: str
    versions: str
    commit: str
    date: str

    @classmethod
    def here(cls, device: torch.device, clock: str) -> Place:
        return cls(
            _device_name(device, clock),
            ", ".join(
                f"{name} {importlib.metadata.version(name)}"
                for name in _PACKAGES
                if importlib.util.find_spec(name) is not None
            ),
            _commit(),
            datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )

    def row(
        self,
        case: str,
        provider: str,
        mode: str,
        metric: str,
        unit: str,
        x: int,
        samples: Sequence[float],
    ) -> Row:
        """Give the row of some samples of one figure."""
        spread = quantiles(samples)
        return Row(case, provider, mode, metric, unit, x, *spread, *astuple(self))


def _device_name(device: torch.device, clock: str) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    threads = torch.get_num_threads()
    return f"{threads} of {os.cpu_count()} cores of {name}, {clock} time"


def _commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,  # an unpacked source distribution has no history
    )
    return run.stdout.strip() or "unknown"


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to the CSV at `path`, with a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    """Give the rows of the latest run in the CSV at `path`."""
    with path.open(newline="") as file:
        entries = list(csv.DictReader(file))
    numbers = {"x": int, "p20": float, "p50": float, "p80": float}
    rows = [Row(**{k: numbers.get(k, str)(v) for k, v in entry.items()}) for entry in entries]
    return [row for row in rows if row.date == max(r.date for r in rows)]


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the medians: a table for each case, a line for each x and provider."""
    for case in _distinct(r.case for r in rows):
        here = [r for r in rows if r.case == case]
        columns = _distinct((r.mode, r.metric, r.unit) for r in here)
        table = Table(title=case, title_justify="left")
        table.add_column("x", justify="right")
        table.add_column("provider")
        for mode, metric, unit in columns:
            table.add_column(f"{mode}\n{metric}\n{unit}", justify="right")
        for x in _distinct(r.x for r in here):
            table.add_section()
            for provider in _distinct(r.provider for r in here if r.x == x):
                found = {
                    (r.mode, r.metric, r.unit): f"{r.p50:.4g}"
                    for r in here
                    if (r.x, r.provider) == (x, provider)
                }
                table.add_row(str(x), provider, *(found.get(column, "") for column in columns))
        console.print(table)


def plot(source: Path, target: Path, modes: Sequence[str]) -> None:
    """Draw the ratios of the latest run in the CSV at `source`, a panel for each case and mode."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in read(source) if r.metric == "ratio" and r.mode in modes]
    panels = _distinct((r.case, r.mode) for r in rows)
    colors = {name: f"C{n}" for n, name in enumerate(_distinct(r.provider for r in rows))}
    across = min(3, max(1, len(panels)))
    down = -(-max(1, len(panels)) // across)
    figure = Figure(figsize=(5 * across, 3.6 * down), layout="constrained")
    for number, (case, mode) in enumerate(panels, 1):
        here = [r for r in rows if (r.case, r.mode) == (case, mode)]
        axes = figure.add_subplot(down, across, number)
        _draw(axes, here, colors)
        axes.set_ylabel(f"time, {here[0].unit}")
        axes.set_title(f"{case}: {mode}", fontsize=9)
        if number == 1:
            axes.legend(fontsize=6)
    figure.suptitle(f"{rows[0].device}, {rows[0].versions}" if rows else "nothing timed")
    FigureCanvasAgg(figure).print_png(str(target))


def _draw(axes: Any, rows: Sequence[Row], colors: Mapping[str, str]) -> None:
    """Draw a line for each provider, medians with a bar from the 20th to the 80th percentile."""
    sizes = _distinct(r.x for r in rows)
    for shift, provider in enumerate(_distinct(r.provider for r in rows)):
        here = [r for r in rows if r.provider == provider]
        at = [sizes.index(r.x) + 0.05 * shift for r in here]
        spread = [[r.p50 - r.p20 for r in here], [r.p80 - r.p50 for r in here]]
        medians = [r.p50 for r in here]
        axes.errorbar(at, medians, spread, marker="o", color=colors[provider], label=provider)
    axes.set_xticks(range(len(sizes)), [str(x) for x in sizes])
    if max(r.p50 for r in rows) > 10 * min(r.p50 for r in rows):
        axes.set_yscale("log")


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
