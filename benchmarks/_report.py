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

# ten of matplotlib's, and what tells itself apart from them
COLORS = ("k", *(f"C{n}" for n in range(10)), "navy", "lime", "gold")
_PACKAGES = ("torch", "transformers", "peft", "triton")


@dataclass(frozen=True)
class Row:
    """One figure: a provider on a case, in a mode, at a size x (which the README says)."""

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


def read_all(path: Path) -> list[Row]:
    """Give the rows in the CSV at `path`, oldest first."""
    with path.open(newline="") as file:
        entries = list(csv.DictReader(file))
    numbers = {"x": int, "p20": float, "p50": float, "p80": float}
    return [Row(**{k: numbers.get(k, str)(v) for k, v in entry.items()}) for entry in entries]


def read(path: Path) -> list[Row]:
    """Give the rows of the latest run in the CSV at `path`."""
    rows = read_all(path)
    return [row for row in rows if row.date == max(r.date for r in rows)]


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the medians: a table for each case, a line for each x and provider."""
    for case in distinct(r.case for r in rows):
        here = [r for r in rows if r.case == case]
        columns = distinct((r.mode, r.metric, r.unit) for r in here)
        table = Table(title=case, title_justify="left")
        table.add_column("x", justify="right")
        table.add_column("provider")
        for mode, metric, unit in columns:
            table.add_column(f"{mode}\n{metric}\n{unit}", justify="right")
        for x in distinct(r.x for r in here):
            table.add_section()
            for provider in distinct(r.provider for r in here if r.x == x):
                found = {
                    (r.mode, r.metric, r.unit): f"{r.p50:.4g}"
                    for r in here
                    if (r.x, r.provider) == (x, provider)
                }
                table.add_row(str(x), provider, *(found.get(column, "") for column in columns))
        console.print(table)


@dataclass(frozen=True)
class Panel:
    """What a plot shows of every case with `cases` in its name.

    Across are the sizes, or the modes if there are several; `x` says what they are.
    """

    modes: tuple[str, ...]
    metric: str = "ratio"
    cases: str = ""
    x: str = "tokens"

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Choose the rows that belong into this panel."""
        return [
            r
            for r in rows
            if r.metric == self.metric and r.mode in self.modes and self.cases in r.case
        ]


def plot(source: Path, target: Path, panels: Sequence[Panel]) -> None:
    """Draw the latest run in the CSV at `source`: for each case, every panel that has rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(source)
    drawn = [
        (case, panel, here)
        for case in distinct(r.case for r in rows)
        for panel in panels
        if (here := panel.rows([r for r in rows if r.case == case]))
    ]
    providers = distinct(r.provider for _, _, here in drawn for r in here)
    looks = {name: (COLORS[n % len(COLORS)], "osv^D"[n % 5]) for n, name in enumerate(providers)}
    across = min(3, max(1, len(drawn)))
    down = -(-max(1, len(drawn)) // across)
    figure = Figure(figsize=(5 * across, 3.6 * down + 0.8), layout="constrained")
    for number, (case, panel, here) in enumerate(drawn, 1):
        axes = figure.add_subplot(down, across, number)
        _draw(axes, panel, here, looks)
        title = case if len(panel.modes) > 1 else f"{case}: {panel.modes[0]}"
        axes.set_title(title, fontsize=9)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            [handles[name] for name in providers],
            providers,
            loc="outside lower center",
            ncols=min(len(providers), 2 * across),
            fontsize=8,
        )
    title = f"{rows[0].device}\n{rows[0].versions}" if drawn else "nothing timed"
    figure.suptitle(title, fontsize=9)
    FigureCanvasAgg(figure).print_png(str(target))


def _draw(
    axes: Any, panel: Panel, rows: Sequence[Row], looks: Mapping[str, tuple[str, str]]
) -> None:
    """Draw a line for each provider, medians with a bar from the 20th to the 80th percentile."""
    by_mode = len(panel.modes) > 1
    places = distinct(r.mode if by_mode else r.x for r in rows)
    providers = distinct(r.provider for r in rows)
    width = 0.6 if by_mode or len(places) == 1 else 0.2
    for number, provider in enumerate(providers):
        here = [r for r in rows if r.provider == provider]
        shift = width * (number / max(1, len(providers) - 1) - 0.5)
        at = [places.index(r.mode if by_mode else r.x) + shift for r in here]
        spread = [[r.p50 - r.p20 for r in here], [r.p80 - r.p50 for r in here]]
        medians = [r.p50 for r in here]
        color, marker = looks[provider]
        axes.errorbar(
            at,
            medians,
            spread,
            color=color,
            marker=marker,
            markersize=4,
            linestyle="none" if by_mode else "-",
            label=provider,
        )
    axes.set_xticks(range(len(places)), [str(place) for place in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel(panel.x, fontsize=8)
    axes.set_ylabel(f"{'time' if panel.metric == 'ratio' else panel.metric}, {rows[0].unit}")
    if max(r.p50 for r in rows) > 10 * min(r.p50 for r in rows):
        axes.set_yscale("log")


def distinct(values: Iterable[Any]) -> list[Any]:
    """Give every value once, in order of appearance."""
    return list(dict.fromkeys(values))
