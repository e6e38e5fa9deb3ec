"""Tables, promises and files of what was measured."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from toys import POINTS

from recipes_peft import report
from recipes_peft.loop import Point

__all__ = ["Found", "kept", "present", "promised"]

# stage: name of a run without its seed: a record for each seed
Found = dict[str, dict[str, list[Any]]]
TOLERANCE = 1e-5  # of the largest logit


def kept(file: Path, make: Callable[[], Any], writes: bool) -> Any:
    """Give what a file holds, made and written the first time."""
    if not file.exists():
        found = make()
        if not writes:
            return found
        report.write_json(file, found)
    return json.loads(file.read_text(encoding="utf-8"))


def promised(found: Found, lengths: Sequence[str]) -> dict[str, bool]:
    """Say which of the promises about models were kept, where they were run."""
    runs, met = found.get("measure", {}), {}
    decoded = [r["decoding"] for records in runs.values() for r in records if "decoding" in r]
    if decoded:
        met["opt: decoding with a cache is the full forward pass"] = max(decoded) <= TOLERANCE
    for arm in ("ncs-a", "ncs-half"):
        if {"opt vanilla", f"opt {arm}"} <= set(runs):
            records = runs[f"opt {arm}"]
            plain = runs["opt vanilla"][: len(records)]  # of the same seeds
            worse = _mean(records, "loss") - _mean(plain, "loss")
            met[f"opt: {arm} ends within 0.02 of vanilla or below"] = worse <= 0.02
    if "bert cs" in runs:
        met |= _mismatch(runs["bert cs"], [int(length) for length in lengths])
    if "opt vanilla" in runs:
        met |= _eight_bits(runs["opt vanilla"])
    tuned = found.get("transfer", {})
    reloaded = [r["reloaded"] for records in tuned.values() for r in records if "reloaded" in r]
    if reloaded:
        met["RoAd on a restored model has the same logits"] = max(reloaded) <= TOLERANCE
    if {"bert cs road", "bert ncs road"} <= set(tuned):
        cs, ncs = (_mean(tuned[f"bert {arm} road"], "loss") for arm in ("cs", "ncs"))
        met["bert: finetuned with RoAd, ncs has a lower loss than cs"] = ncs < cs
    low = found.get("apiq", {})
    narrow = [name for name in low if name.endswith(" 2 apiq")]
    if narrow:
        met["ApiQ: at 2 bits a lower loss than rounding, every arm"] = all(
            _mean(low[name], "a32") < _mean(low[name.replace(" apiq", " rounded")], "a32")
            for name in narrow
        )
    return met


def _mismatch(records: Sequence[Any], lengths: Sequence[int]) -> dict[str, bool]:
    """Compare the weights of cs with its own softmax and with the normalised one."""
    top, shortest = str(max(lengths)), str(min(lengths))
    gaps = {
        str(length): statistics.mean(
            r["lengths"][str(length)] - r["swapped"][str(length)] for r in records
        )
        for length in lengths
    }
    return {
        "bert: cs and the ncs that matches it are equal at the pretraining length": (
            abs(gaps[top]) <= 1e-4
        ),
        "bert: at every shorter length ncs has a lower loss than cs, same weights": all(
            gap > 0 for length, gap in gaps.items() if length != top
        ),
        "bert: by 0.03 or more at the shortest": gaps[shortest] >= 0.03,
    }


def _eight_bits(records: Sequence[Any]) -> dict[str, bool]:
    added = {
        factor: statistics.mean(r["injected"][factor] - r["loss"] for r in records)
        for factor in records[0]["injected"]
    }
    met = {"opt: 8 bits cost 0.02 at most": added["1"] <= 0.02}
    if "200" in added:
        met["opt: 8 bits cost 0.5 or more with an outlier of 200"] = added["200"] >= 0.5
    return met


def _mean(records: Sequence[Any], key: str) -> float:
    return statistics.mean(record[key] for record in records)


# ---- tables and files ---------------------------------------------------------------------------


def present(given: Any, out: Path, found: Found, toys: Any, curves: Mapping[str, Any]) -> None:
    """Print the tables that there are, and write CSV files and plots."""
    runs = found.get("measure", {})
    if runs:
        rows = [[name, *_row(records)] for name, records in runs.items()]
        columns = ["", "seeds", "loss", "perplexity", "W8A8 perplexity", "max inf norm"]
        columns += ["avg kurtosis", "max kurtosis", *(["BLiMP"] if given.blimp else [])]
        report.show(f"pretrained at {given.length}, {', '.join(given.data)}", columns, rows)
        columns = ["", *given.lengths]
        report.show("loss by length of the window", columns, list(_by_length(runs)))
        _write(out / "measure.csv", ["run", "seed", "what", "value"], _flat(runs))
    tuned = found.get("transfer", {})
    if tuned:
        columns = ["", "seeds", "trained", "right", "held-out loss"]
        rows = [
            [
                name,
                str(len(records)),
                f"{records[0]['trained']:,}",
                _spread(records, "right", 3),
                _spread(records, "loss", 3),
            ]
            for name, records in tuned.items()
        ]
        report.show(f"finetuned at {given.task_length}, {given.task}", columns, rows)
        _write(out / "transfer.csv", ["run", "seed", "what", "value"], _flat(tuned))
    low = found.get("apiq", {})
    if low:
        columns = ["", "loss", "with 8-bit activations"]
        rows = [[n, f"{r[0]['a32']:.3f}", f"{r[0]['a8']:.3f}"] for n, r in low.items()]
        report.show("weights of low bits", columns, rows)
        _write(out / "apiq.csv", ["run", "seed", "what", "value"], _flat(low))
    if curves:
        points = {n: [Point(**p) for p in c["points"]] for n, c in curves.items()}
        report.curves(out, {n: c["untrained"] for n, c in curves.items()}, points)
    if toys or runs:
        _plot(out / "lengths.png", runs, toys)


def _row(records: Sequence[Any]) -> list[str]:
    outliers = [record["outliers"] for record in records]
    return [
        str(len(records)),
        _spread(records, "loss", 3),
        f"{report.perplexity(_mean(records, 'loss')):.2f}",
        f"{report.perplexity(_mean(records, 'w8a8')):.2f}",
        *(
            f"{_mean(outliers, key):.2f}"
            for key in ("max_inf_norm", "avg_kurtosis", "max_kurtosis")
        ),
        *([f"{_mean(records, 'blimp'):.1%}"] if "blimp" in records[0] else []),
    ]


def _by_length(runs: Mapping[str, Sequence[Any]]) -> Any:
    for name, records in runs.items():
        for key, words in (("lengths", name), ("swapped", f"{name}, with the other softmax")):
            values = [record[key] for record in records if key in record]
            if values:
                yield [words, *(f"{_mean(values, length):.3f}" for length in values[0])]


def _spread(records: Sequence[Any], key: str, digits: int) -> str:
    values = [record[key] for record in records]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _flat(runs: Mapping[str, Sequence[Any]]) -> Any:
    """Give rows (run, seed, what, value) of all numbers but the points of curves."""
    for name, records in runs.items():
        for seed, record in enumerate(records):
            for what, value in record.items():
                if isinstance(value, Mapping):
                    yield from ([name, seed, f"{what} {key}", v] for key, v in value.items())
                elif not isinstance(value, list):
                    yield [name, seed, what, value]


def _write(file: Path, columns: Sequence[str], rows: Any) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(columns)
    lines.writerows(rows)
    report.write(file, text.getvalue().encode())


def _plot(file: Path, runs: Mapping[str, Sequence[Any]], toys: Any) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for i, (name, records) in enumerate(runs.items()):
        if name.startswith("bert"):
            for key, line in (("lengths", "o-"), ("swapped", "o--")):
                values = [record[key] for record in records if key in record]
                if values:
                    words = name if key == "lengths" else f"{name}, the other softmax"
                    means = [_mean(values, length) for length in values[0]]
                    left.plot([int(x) for x in values[0]], means, f"C{i}{line}", label=words)
    left.set(xscale="log", xlabel="length of the window", ylabel="loss (nats)")
    if toys:
        for name, sums in toys["sums"].items():
            middle.plot(toys["lengths"], sums, "o-", label=name)
        for name, points in toys["heads"].items():
            right.plot(POINTS, [gap for gap, _ in points], "o-", label=name)
    middle.set(xscale="log", xlabel="visible keys", ylabel="mean sum of a row, random logits")
    right.set(xlabel="step", ylabel="gap of logits, head that does nothing")
    for axes in (left, middle, right):
        if axes.get_lines():
            axes.legend(fontsize=7)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    report.write(file, image.getvalue())
