"""The plot of `benchmarks.quantize`: perplexity against bits per weight, adapters counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._quantizers import FULL_PRECISION
from benchmarks._report import COLORS, Row, distinct

MODES = ("quantised", "finetuned")
_STYLES = ("-", "--", ":", "-.")  # of ranks


def plot(rows: Sequence[Row], target: Path) -> None:
    """Draw the latest figures of each model: a line for each method and rank over its widths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    latest = {(r.case, r.provider, r.x, r.mode, r.metric): r for r in rows}
    labels = distinct(_label(r) for r in rows)
    figure = Figure(figsize=(11, 4.5 * len(labels) + 0.8), layout="constrained")
    methods = [name for name in distinct(r.provider for r in rows) if name != FULL_PRECISION]
    looks = {name: (COLORS[n % len(COLORS)], "osv^D"[n % 5]) for n, name in enumerate(methods)}
    for number, (label, mode) in enumerate((a, b) for a in labels for b in MODES):
        axes = figure.add_subplot(len(labels), len(MODES), number + 1)
        _draw(axes, [r for r in latest.values() if (_label(r), r.mode) == (label, mode)], looks)
        axes.set_title(f"{label}: {mode}", fontsize=9)
    handles = {
        name: handle
        for axes in figure.axes
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=7
        )
    if rows:
        figure.suptitle(rows[-1].device, fontsize=9)
    FigureCanvasAgg(figure).print_png(str(target))


def _label(row: Row) -> str:
    return row.case.rpartition(", ")[0]


def _draw(axes: Any, rows: Sequence[Row], looks: dict[str, tuple[str, str]]) -> None:
    ranks = sorted({r.x for r in rows})
    values = {(r.provider, r.x, r.case, r.metric): r.p50 for r in rows}
    for provider, rank in sorted({(r.provider, r.x) for r in rows}):
        cases = distinct(r.case for r in rows if (r.provider, r.x) == (provider, rank))
        points = sorted(
            (values[provider, rank, case, "bits"], values[provider, rank, case, "perplexity"])
            for case in cases
        )
        style = _STYLES[ranks.index(rank) % len(_STYLES)]
        name = f"{provider}, rank {rank}"
        if provider == FULL_PRECISION:
            axes.axhline(points[0][1], color="grey", linestyle=style, linewidth=1, label=name)
            continue
        color, marker = looks[provider]
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            marker=marker,
            markersize=4,
            linestyle=style,
            label=name,
        )
    axes.set_xlabel("bits per weight, adapters counted", fontsize=8)
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
