"""The report: abilities by arm with intervals, what was promised, a plot; all of it as files."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from retention import Figure, judge, usable

from recipes_peft import report

ABILITIES = ("few-shot", "context", "steer")
SHOWN = ("translation", *ABILITIES, "lm", "chrf", "register", "pronouns", "unaligned", "crossing")


def present(out: Path, settings: Mapping[str, Any], runs: Mapping[str, Any]) -> None:
    """Show the table and the promises, and write table, points, plot and results."""
    base = {n: Figure(**kept) for n, kept in runs["base"]["figures"].items()}
    names = [name for name in SHOWN if name in base]
    able = usable({name: base[name] for name in ABILITIES if name in base})
    by_arm: dict[str, list[Any]] = defaultdict(list)
    for name, run in runs.items():
        if name != "base":
            by_arm[name.rpartition(" ")[0]].append(run)
    rows = [["base", *(_with_interval(base[name]) for name in names), ""]]
    for arm, found in by_arm.items():
        values = [[run["checkpoints"][-1][name] for run in found] for name in names]
        share = f"{found[0]['token_share']:.2f}"
        rows.append([arm, *(_mean_and_spread(each) for each in values), share])
    report.show(f"{settings['model']}: abilities", ["", *names, "text share"], rows)
    for name, can in able.items():
        print(f"{'yes' if can else 'NO '}  P0: the base model is capable of {name}")
    kept = [name for name, can in able.items() if can]
    judged = {}
    for tuner in dict.fromkeys(arm.partition("-")[0] for arm in by_arm):
        par, mix, control = (
            _last(by_arm.get(f"{tuner}-{stream}", [])) for stream in ("par", "mix", "control")
        )
        if par and mix:
            reference = _reference(by_arm[f"{tuner}-par"], base)
            judged[tuner] = judge(reference, par, mix, kept, control)
    for tuner, found in judged.items():
        for promise, met in (
            ("P1: translation gains 5 % or more", found.gain),
            ("P2: translations alone cost abilities", found.paradox),
            ("P3: running text gives half of that back", found.remedy),
        ):
            print(f"{_word(met)}  {tuner}, {promise}")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "parallel", *names])
    for name, run in runs.items():
        table.writerows(
            [name, point["parallel"], *(point[n] for n in names)] for point in run["checkpoints"]
        )
    report.write(out / "abilities.csv", text.getvalue().encode())
    if by_arm:
        report.write(out / "abilities.png", _plot(base, by_arm, [*kept, "lm"]))
    results = {"settings": settings, "able": able}
    results["judged"] = {tuner: asdict(found) for tuner, found in judged.items()}
    report.write_json(out / "results.json", results)
    print(f"results.json, abilities.csv, abilities.png and all runs are in {out}")


def _last(found: Sequence[Any]) -> list[dict[str, float]]:
    return [run["checkpoints"][-1] for run in found]


def _reference(found: Sequence[Any], base: Mapping[str, Figure]) -> dict[str, float]:
    """Give what abilities are compared with: the base, quantised where the arm is."""
    if found[0]["before"]:
        return dict(found[0]["checkpoints"][0])
    return {name: figure.value for name, figure in base.items()}


def _word(met: bool | None) -> str:
    return "---" if met is None else "yes" if met else "NO "


def _with_interval(figure: Figure) -> str:
    low, high = figure.interval()
    return f"{figure.value:.3f} ({low:.3f} to {high:.3f})"


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def _plot(
    base: Mapping[str, Figure], by_arm: Mapping[str, Sequence[Any]], names: Sequence[str]
) -> bytes:
    """Draw each ability against the loss of translation, both relative to the untrained model."""
    drawing = Drawing(figsize=(4 * len(names), 4), layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for arm, found in by_arm.items():
            reference = _reference(found, base)
            start = [] if found[0]["before"] else [reference]
            points = [
                [*start, *run["checkpoints"]] if start else run["checkpoints"] for run in found
            ]
            x = _means(points, "translation", reference)
            axes.plot(x, _means(points, name, reference), "o-", label=arm, markersize=3)
        axes.axhline(1, color="gray", linestyle=":")
        axes.set(xlabel="translation loss, of the base's", title=name)
        axes.invert_xaxis()
    panels[0].set_ylabel("of the base's")
    panels[-1].legend()
    image = io.BytesIO()
    drawing.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _means(
    points: Sequence[Sequence[Mapping[str, float]]], name: str, base: Mapping[str, float]
) -> list[float]:
    """Give the mean over seeds at each checkpoint, relative to the base."""
    scale = base[name] or math.nan
    return [fmean(p[name] / scale for p in same) for same in zip(*points, strict=True)]
