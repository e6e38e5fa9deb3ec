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
from retention import Figure, compare, judge, usable

from recipes_peft import report

ABILITIES = ("few-shot", "context", "steer")
SHOWN = (
    *("translation", *ABILITIES, "lm", "chrf", "register"),
    *("pronouns", "contrastive", "unaligned", "crossing"),
)
# not on the screen, but in the files
MORE = (
    *("lm-source", "lm-target", "steer-accuracy"),
    *("register-formal", "register-informal", "register-matched"),
)


def present(out: Path, settings: Mapping[str, Any], runs: Mapping[str, Any]) -> None:
    """Show the table and the promises, and write tables, plot and results."""
    base = _figures(runs["base"]["figures"])
    by_arm: dict[str, dict[int, Any]] = defaultdict(dict)
    for name, run in runs.items():
        if name != "base":
            arm, _, seed = name.rpartition(" ")
            by_arm[arm][int(seed)] = run
    _show(settings["model"], base, by_arm)
    able = usable({name: base[name] for name in ABILITIES if name in base})
    for name, can in able.items():
        print(f"{'yes' if can else 'NO '}  P0: the base model is capable of {name}")
    judged, quantized = {}, {}
    for tuner in dict.fromkeys(arm.partition("-")[0] for arm in by_arm):
        par, mix, control = (
            by_arm.get(f"{tuner}-{stream}", {}) for stream in ("par", "mix", "control")
        )
        if not par.keys() & mix.keys():
            continue
        reference, can_do = _reference(par, base), able
        if reference is not base:
            can_do = usable({name: reference[name] for name in able})
            quantized[tuner] = can_do
            for name, can in can_do.items():
                print(f"{'yes' if can else 'NO '}  {tuner}, P0: quantised, it is capable of {name}")
        judged[tuner] = judge(
            _values(reference),
            _last(par),
            _last(mix),
            [name for name, can in can_do.items() if can],
            _last(control),
        )
    for tuner, found in judged.items():
        alone = found.paradox and found.remedy is None
        for promise, met in (
            ("P1: translation gains 5 % or more", found.gain),
            ("P2: translations alone cost abilities", found.paradox),
            ("P3: running text gives half of that back", found.remedy),
        ):
            missing = f" (not to be told without {tuner}-control)" if alone and met is None else ""
            print(f"{_word(met)}  {tuner}, {promise}{missing}")
    _write_tables(out, base, runs)
    if by_arm:
        capable = [name for name, can in able.items() if can]
        report.write(out / "abilities.png", _plot(base, by_arm, [*capable, "lm"]))
    results = {"settings": settings, "able": able, "able_quantized": quantized}
    results["judged"] = {tuner: asdict(found) for tuner, found in judged.items()}
    results["scores"] = {name: run["scores"] for name, run in runs.items()}
    report.write_json(out / "results.json", results)
    print(f"results.json, abilities.csv, retention.csv, abilities.png and all runs are in {out}")


def _show(model: str, base: Mapping[str, Figure], by_arm: Mapping[str, Mapping[int, Any]]) -> None:
    names = [name for name in SHOWN if name in base]
    rows = [["base", *(_with_interval(base[name]) for name in names), ""]]
    for arm, found in by_arm.items():
        first, *others = found.values()
        if others:
            cells = [
                _mean_and_spread([run[name] for run in _last(found).values()]) for name in names
            ]
        else:
            figures = _figures(first["figures"])
            cells = [_with_interval(figures[name]) for name in names]
        rows.append([arm, *cells, f"{first['token_share']:.2f}"])
    report.show(f"{model}: abilities", ["", *names, "text share"], rows)


def _write_tables(out: Path, base: Mapping[str, Figure], runs: Mapping[str, Any]) -> None:
    """Write the figures at all checkpoints, and the last ones beside those of the reference."""
    names = [name for name in (*SHOWN, *MORE) if name in base]
    points = [["run", "parallel", *names]]
    ends = [["run", "ability", "value", "low", "high", "of", "reference"]]
    for kind in ("ratio", "difference"):
        ends[0] += [kind, f"{kind}_low", f"{kind}_high"]
    for run_name, run in runs.items():
        points += [[run_name, p["parallel"], *(p[n] for n in names)] for p in run["checkpoints"]]
        before = run.get("before")
        reference = _figures(before) if before else base
        for name, now in _figures(run["figures"]).items():
            beside = compare(now, reference[name])
            ends.append(
                [
                    *(run_name, name, now.value, *now.interval()),
                    *("quantised" if before else "base", reference[name].value),
                    *(beside.ratio, *beside.ratio_interval),
                    *(beside.difference, *beside.difference_interval),
                ]
            )
    for file, rows in (("abilities.csv", points), ("retention.csv", ends)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        report.write(out / file, text.getvalue().encode())


def _figures(kept: Mapping[str, Any]) -> dict[str, Figure]:
    return {name: Figure(**figure) for name, figure in kept.items()}


def _values(figures: Mapping[str, Figure]) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items()}


def _last(found: Mapping[int, Any]) -> dict[int, Mapping[str, float]]:
    return {seed: run["checkpoints"][-1] for seed, run in found.items()}


def _reference(found: Mapping[int, Any], base: Mapping[str, Figure]) -> Mapping[str, Figure]:
    """Give what abilities are compared with: the base, quantised where the arm is."""
    before = next(iter(found.values()))["before"]
    return _figures(before) if before else base


def _word(met: bool | None) -> str:
    return "---" if met is None else "yes" if met else "NO "


def _with_interval(figure: Figure) -> str:
    low, high = figure.interval()
    return f"{figure.value:.3f} ({low:.3f} to {high:.3f})"


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _plot(
    base: Mapping[str, Figure], by_arm: Mapping[str, Mapping[int, Any]], names: Sequence[str]
) -> bytes:
    """Draw each ability against the loss of translation, both relative to the untrained model."""
    drawing = Drawing(figsize=(4 * len(names), 4), layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for arm, found in by_arm.items():
            reference = _reference(found, base)
            start = [_values(base)] if reference is base else []  # the others have it already
            points = [[*start, *run["checkpoints"]] for run in found.values()]
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
    points: Sequence[Sequence[Mapping[str, float]]], name: str, base: Mapping[str, Figure]
) -> list[float]:
    """Give the mean over seeds at each checkpoint, relative to the base."""
    scale = base[name].value or math.nan
    return [fmean(p[name] / scale for p in same) for same in zip(*points, strict=True)]
