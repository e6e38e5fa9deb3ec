"""What a calibration did, as tables, as a CSV and as a picture."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from apiq_peft.calibration import BlockReport, LayerReport

_COLUMNS = (
    *("block", "layer", "bits", "group_size", "error_before", "error_after"),
    *("high_clip", "low_clip", "first_loss", "last_loss", "seconds", "peak_bytes"),
)

_MIB = 2**20


@dataclass(frozen=True)
class KindReport:
    """The means over all layers of one kind, which is the last part of their names."""

    kind: str
    layers: int
    error_before: float
    error_after: float
    high_clip: float
    low_clip: float
    seconds: float | None  # none where the layers of a block were trained together


def kinds_of(reports: Iterable[BlockReport]) -> list[KindReport]:
    """Give the means of each kind of layer, in the order in which a block holds them."""
    kinds: dict[str, list[LayerReport]] = {}
    for report in reports:
        for layer in report.layers:
            kinds.setdefault(layer.layer.rpartition(".")[2], []).append(layer)
    return [
        KindReport(
            kind,
            len(layers),
            fmean(layer.error_before for layer in layers),
            fmean(layer.error_after for layer in layers),
            fmean(layer.high_clip for layer in layers),
            fmean(layer.low_clip for layer in layers),
            _mean_seconds(layers),
        )
        for kind, layers in kinds.items()
    ]


def _mean_seconds(layers: Iterable[LayerReport]) -> float | None:
    seconds = [layer.seconds for layer in layers if layer.seconds is not None]
    return fmean(seconds) if seconds else None


def tables(reports: Sequence[BlockReport]) -> list[Table]:
    """Give two tables to print with rich: of blocks, and of kinds of layers."""
    blocks = _table(
        "relative error of a block's output, its time, and the most memory held until then",
        *("block", "rounded", "calibrated", "seconds", "MiB"),
    )
    for r in reports:
        errors = (f"{r.error_before:.4f}", f"{r.error_after:.4f}")
        seconds = "resumed" if r.resumed else f"{r.seconds:.1f}"
        memory = "-" if r.peak_bytes is None else f"{r.peak_bytes / _MIB:.0f}"
        blocks.add_row(r.block, *errors, seconds, memory)
    kinds = _table(
        "mean relative error of a layer's output, share of the range that is kept, and time",
        *("layer", "count", "rounded", "calibrated", "above", "below", "seconds"),
    )
    for k in kinds_of(reports):
        values = (k.error_before, k.error_after, k.high_clip, k.low_clip)
        seconds = "the block's" if k.seconds is None else f"{k.seconds:.1f}"
        kinds.add_row(k.kind, str(k.layers), *(f"{value:.4f}" for value in values), seconds)
    return [blocks, kinds]


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def write_csv(reports: Iterable[BlockReport], path: str | Path) -> None:
    """Write a row for each block, and below it, with `layer` filled in, one for each of its layers.

    Losses are those of the first and the last epoch: a block's if it was trained as one, else a
    layer's. `seconds` of a layer are empty if its block was trained as one. `peak_bytes` is the
    most memory that was held until a block was done.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, restval="")
    writer.writeheader()
    for report in reports:
        writer.writerows(_rows(report))
    write_whole(Path(path), text.getvalue().encode())


def _rows(report: BlockReport) -> Iterable[dict[str, Any]]:
    names = ("error_before", "error_after", "seconds", "peak_bytes")
    own = {name: vars(report)[name] for name in names}
    yield {"block": report.block, **own, **_ends(report.losses.get("block"))}
    for layer in report.layers:
        losses = report.losses.get(layer.layer.removeprefix(report.block + "."))
        yield {"block": report.block, **vars(layer), **_ends(losses)}


def _ends(losses: Sequence[float] | None) -> Mapping[str, float]:
    return {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}


def write_plot(reports: Sequence[BlockReport], path: str | Path) -> None:
    """Draw errors, clipping, time and memory, block by block and by kinds of layers, to a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("a plot needs matplotlib; pip install 'road-apiq-peft[bench]'") from error
    figure = Figure(figsize=(max(6, 2 + 0.2 * len(reports)), 15), layout="constrained")
    blocks, layers, clips, times, memory = figure.subplots(5, 1, sharex=True)
    places = range(len(reports))
    blocks.plot(places, [r.error_before for r in reports], "o--", label="rounded")
    blocks.plot(places, [r.error_after for r in reports], "o-", label="calibrated")
    blocks.set(title="relative error of a block's output", ylim=(0, None))
    times.plot(places, [r.seconds for r in reports], "o-", label="block")
    peaks = [math.nan if r.peak_bytes is None else r.peak_bytes / _MIB for r in reports]
    memory.plot(places, peaks, "o-", label="this process")
    for kind in (k.kind for k in kinds_of(reports)):
        found = [
            (place, layer)
            for place, report in enumerate(reports)
            for layer in report.layers
            if layer.layer.rpartition(".")[2] == kind
        ]
        at = [place for place, _ in found]
        layers.plot(at, [layer.error_after for _, layer in found], "o-", label=kind)
        kept = [(layer.high_clip + layer.low_clip) / 2 for _, layer in found]
        clips.plot(at, kept, "o-", label=kind)
        seconds = [(place, layer.seconds) for place, layer in found if layer.seconds is not None]
        if seconds:  # else those of the block
            times.plot(*zip(*seconds, strict=True), "o-", label=kind)
    layers.set(title="relative error of a layer's output, calibrated", ylim=(0, None))
    clips.set(title="mean share of the range that is kept")
    times.set(title="seconds", ylim=(0, None))
    memory.set(
        title="most memory held until then, MiB",
        ylim=(0, None),
        xlabel="block, in the order of running",
    )
    for axis in (blocks, layers, clips, times, memory):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize="small", ncols=2)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(Path(path), picture.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears when it is complete, or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
