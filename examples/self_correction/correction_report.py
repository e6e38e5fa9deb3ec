"""The promises, the tables and the figures, from the results of the runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from correction import SelfCorrectionLoss, cross_entropy, sharpened, trust
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes_peft import report

__all__ = ["exact", "present", "promises", "verdict"]

TRUSTED = {0: 0.027, 0.25: 0.109, 0.5: 0.354, 0.6: 0.5, 0.75: 0.711, 1: 0.917}  # g(t/T)


def exact() -> bool:
    """Tell whether the loss has the gradient p - q~, is cross-entropy at lambda = 0, and g."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 11, generator=generator).mul(3).requires_grad_()
    y = torch.randint(11, (40,), generator=generator)
    loss = SelfCorrectionLoss()
    (found,) = torch.autograd.grad(loss(z, y, 0.7).sum(), z)
    with torch.no_grad():
        share = loss.share(z, 0.7)[:, None]
        onehot = torch.nn.functional.one_hot(y, 11)
        revised = (1 - share) * onehot + share * sharpened(z, loss.tau)
        wanted = z.softmax(-1) - revised
        plain = SelfCorrectionLoss(beta=1e3)(z, y, 0.7) - cross_entropy(z, y)
    errors = [(found - wanted).abs().max().item(), plain.abs().max().item()]
    return max(errors) < 1e-6 and all(abs(trust(t) - g) < 5e-4 for t, g in TRUSTED.items())


Results = dict[tuple[str, float, str], list[dict[str, Any]]]  # by tuner, rate and arm; a seed each


def grouped(results: Iterable[dict[str, Any]]) -> Results:
    found: Results = {}
    for result in results:
        found.setdefault((result["tuner"], result["rate"], result["arm"]), []).append(result)
    return found


def promises(results: Results, tuner: str, rates: Sequence[float]) -> dict[str, bool | None]:
    """Judge what was promised, as far as the runs that it needs were made; None if none can tell.

    The first rate is the one of the noisy comparison. If it is zero, data may have noise of its
    own, and only the loss is judged.
    """
    made: dict[str, bool | None] = {"S0 the loss is exact": exact()}
    if not rates[0]:
        return made
    ce, own, control = (results.get((tuner, rates[0], arm), []) for arm in ("ce", "self", "tau1"))

    def average(runs: list[dict[str, Any]], key: str) -> float:
        return mean(run[key] for run in runs)

    if ce and own:
        pairs = list(zip(own, ce, strict=True))
        better = sum(a["matched_loss"] < b["matched_loss"] for a, b in pairs)
        made |= {
            "S1 test loss at most 0.75 times noisy CE's, every seed": all(
                a["loss"] <= 0.75 * b["loss"] for a, b in pairs
            ),
            "S1 matched loss lower on the mean, and for two seeds of three": (
                average(own, "matched_loss") < average(ce, "matched_loss")
                and 3 * better >= 2 * len(pairs)
            ),
            "S1 chrF++ at least noisy CE's on the mean": average(own, "chrf")
            >= average(ce, "chrf"),
        }
    if own and control:
        made["S2 loss and matched loss below those of the control with tau = 1"] = all(
            average(own, key) < average(control, key) for key in ("loss", "matched_loss")
        )
    clean = [results.get((tuner, 0.0, arm), []) for arm in ("ce", "self")]
    if all(clean):
        scores = [run["chrf"] for run in clean[0]]
        spread = stdev(scores) if len(scores) > 1 else 0.0
        gap = abs(average(clean[1], "chrf") - mean(scores))
        made["S3 on clean data chrF++ as with CE, to a standard deviation or 0.5"] = gap <= max(
            spread, 0.5
        )
    if own:
        # a seed may have no noisy pair among those that are checked, or no clean one
        early = [[c["loss_auroc"] for c in run["checks"] if c["progress"] < 0.6] for run in own]
        told = [max(seed) for seed in early if seed and None not in seed]
        gaps = [gap for run in own if (gap := _gap(run["checks"][-1])) is not None]
        made |= {
            "S4 -log p tells noisy tokens (AUROC above 0.6) before t/T = 0.6": (
                mean(told) > 0.6 if told else None
            ),
            "S4 less is left of noisy labels than of clean ones": mean(gaps) > 0 if gaps else None,
        }
    return made


def verdict(made: dict[str, bool | None]) -> str:
    """Say what a failure means, "" if there is nothing to say."""
    improved = [kept for promise, kept in made.items() if "matched loss lower" in promise]
    improved += [kept for promise, kept in made.items() if promise.startswith("S1 chrF")]
    if improved and not any(improved):
        return "neither matched loss nor chrF++ improved: this is calibration only"
    return ""


def present(given: Any, out: Path, results: list[dict[str, Any]]) -> bool:
    """Print the tables and the promises; write JSON, CSV and PNG.

    Gives whether the loss is exact.
    """
    groups = grouped(results)
    columns = ["tuner", "noise", "arm", "seeds", "loss", "matched", "chrF++", "BLEU", "min"]
    rows = []
    for (tuner, rate, arm), runs in groups.items():
        values = [_spread(runs, key) for key in ("loss", "matched_loss", "chrf", "bleu")]
        minutes = f"{mean(run['seconds'] for run in runs) / 60:.1f}"
        rows.append([tuner, f"{rate:g}", arm, str(len(runs)), *values, minutes])
    report.show(f"{given.model}, clean test pairs: mean and range of the seeds", columns, rows)
    filters = next((run["filters"] for run in results if any(run["filters"].values())), {})
    if filters:
        shown = [[n, "" if v is None else f"{v:.2f}"] for n, v in filters.items()]
        title = f"Filters: AUROC of noisy pairs, of the first {given.check_pairs} to train on"
        report.show(title, ["filter", "AUROC"], shown)
    if certain := _certainties(groups):
        title = "Self-correction, in the end: certainty of development tokens"
        report.show(title, ["tuner", "noise", "5 %", "median", "95 %"], certain)
    made = promises(groups, given.tuners[0], [float(rate) for rate in given.rates])
    for promise, kept in made.items():
        print(f"{_JUDGED[kept]}  {promise}")
    if not float(given.rates[0]):
        print("S1 to S4 need simulated noise: begin --rates with a share above 0")
    if said := verdict(made):
        print(said)
    settings = vars(given)
    report.write_json(
        out / "results.json", {"settings": settings, "promises": made, "runs": results}
    )
    _csv(out / "results.csv", _table(results))
    _csv(out / "curves.csv", _points(results))
    _figure(out / "curves.png", groups)
    print(f"results.json, results.csv, curves.csv and curves.png are in {out}")
    return bool(made["S0 the loss is exact"])


_JUDGED = {True: "yes", False: "NO ", None: "---"}


def _certainties(groups: Results) -> list[list[str]]:
    """Give the range of c where it is used, mean of the seeds: of each tuner on each noise."""
    names = ("certainty_low", "certainty_middle", "certainty_high")
    return [
        [tuner, f"{rate:g}"]
        + [f"{mean(run['checks'][-1][name] for run in runs):.3f}" for name in names]
        for (tuner, rate, arm), runs in groups.items()
        if arm == "self"
    ]


def _spread(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


_RUN = ("tuner", "rate", "arm", "seed")
_VALUES = ("loss", "matched_loss", "temperature", "chrf", "bleu", "comet", "trained", "seconds")


def _table(results: list[dict[str, Any]]) -> list[list[Any]]:
    return [[*_RUN, *_VALUES], *([run[key] for key in (*_RUN, *_VALUES)] for run in results)]


def _points(results: list[dict[str, Any]]) -> list[list[Any]]:
    checks = [(run, check) for run in results for check in run["checks"]]
    names = list(checks[0][1]) if checks else []
    return [
        [*_RUN, *names],
        *([*(run[key] for key in _RUN), *check.values()] for run, check in checks),
    ]


def _csv(path: Path, rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    report.write(path, text.getvalue().encode())


def _figure(path: Path, groups: Results) -> None:
    """Draw, for what was trained on noise: self-knowledge, what is left of labels, memorising."""
    panels: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
        ("AUROC of -log p, noisy tokens", lambda check: check["loss_auroc"]),
        ("mass left: clean minus noisy", _gap),
        ("noisy labels that are the likeliest", lambda check: check["noisy_right"]),
    ]
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    shown = {key: runs for key, runs in groups.items() if key[1] and key[2] != "clean"}
    for axes, (title, value) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for (tuner, _, arm), runs in shown.items():
            steps = [check["progress"] for check in runs[0]["checks"]]
            lines = [[value(check) for check in run["checks"]] for run in runs]
            if all(point is not None for line in lines for point in line):
                means = [mean(column) for column in zip(*lines, strict=True)]
                axes.plot(steps, means, "o-", label=f"{tuner}, {arm}")
        axes.set(xlabel="share of training", title=title)
    if shown:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    report.write(path, image.getvalue())


def _gap(check: dict[str, Any]) -> float | None:
    if check["noisy_mass"] is None or check["clean_mass"] is None:
        return None
    return check["clean_mass"] - check["noisy_mass"]
