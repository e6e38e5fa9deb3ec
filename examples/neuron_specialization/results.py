"""Keep what every arm and seed gave, and show all of it: a table, the promises, the files."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checks
import overlaps
from directions import Task
from masking import Table, save
from settings import Settings

from apiq_peft.export import save_whole
from recipes_peft import report
from recipes_peft.loop import Point

__all__ = ["keep", "mean", "present", "promised", "read", "save_model"]

Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # by arm, a run for each seed
METRICS = ("nll", "chrf", "bleu")


def keep(file: Path, found: dict[str, Any]) -> None:
    """Write what one run gave, when it is finished."""
    report.write_json(file, {**found, "curve": [asdict(point) for point in found["curve"]]})


def read(file: Path) -> dict[str, Any]:
    """Read what `keep` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def save_model(model: Any, masks: Table | None, folder: Path) -> None:
    """Write a trained model or adapter, and its masks, unless they are there."""

    def write(part: Path) -> None:
        model.save_pretrained(part)
        if masks is not None:
            save(masks, part / "masks.safetensors")

    if not folder.exists():
        save_whole(folder, write)


def mean(run: Mapping[str, Any], metric: str, tasks: Sequence[Task], kind: str = "") -> float:
    """Give the mean of a metric over the tasks of a run, or over those of a kind."""
    chosen = [task.name for task in tasks if kind in ("", task.kind)]
    return statistics.mean(run["scores"][name][metric] for name in chosen)


def promised(runs: Runs, tasks: Sequence[Task]) -> dict[str, bool]:
    """Say which of the promises about the method were kept, where the arms were run."""
    loss = {arm: [mean(run, "nll", tasks) for run in found] for arm, found in runs.items()}
    kept = {}
    for other, words in (("full", "training on without masks"), ("full+random", "random masks")):
        if "full+ns" in loss and other in loss:
            better = [a < b for a, b in zip(loss["full+ns"], loss[other], strict=True)]
            kept[f"lower loss than {words}, in 2 of 3 seeds"] = 3 * sum(better) >= 2 * len(better)
    if {"full", "full+ns"} <= set(runs):
        chrf = {
            arm: statistics.mean(mean(run, "chrf", tasks) for run in runs[arm])
            for arm in ("full", "full+ns")
        }
        kept["chrF++ at least that of training on without masks"] = chrf["full+ns"] >= chrf["full"]
    return kept


def verdict(modular: Mapping[str, bool], method: Mapping[str, bool]) -> str:
    """Say in a sentence what the promises, kept or not, mean together."""
    dense = method.get("lower loss than training on without masks, in 2 of 3 seeds")
    drawn = method.get("lower loss than random masks, in 2 of 3 seeds")
    if dense is None or drawn is None:
        return "The arms full, full+ns and full+random are needed to judge the method."
    if dense and not drawn:
        return "Better than dense but not than random masks: regularisation, not specialization."
    if all(method.values()):
        return "The method works here: better than dense training and than random masks."
    if all(modular.values()):
        return "A negative result at this scale: neurons are specific, yet masks do not do better."
    return (
        "Neurons are not specific enough here, and masks do not do better in all that is promised."
    )


def present(
    given: Settings, out: Path, tasks: Sequence[Task], runs: Runs, found: Mapping[str, Any]
) -> None:
    """Show the table and what was promised, and write everything to the folder."""
    ends = {"bleu": 2, **({"comet": 4} if given.comet else {})}  # metrics, with their digits
    base = {"scores": found["base"], "trained": 0, "seconds": 0.0}
    rows = [_row(arm, some, tasks, ends) for arm, some in {"base": [base], **runs}.items()]
    columns = ["", "trained", "seeds", "loss/char", "chrF++ from", "to", "all"]
    columns += [*(metric.upper() for metric in ends), "min"]
    report.show(f"{len(tasks)} directions, {given.data}, masks of k = {_ks(given)}", columns, rows)
    modular = overlaps.promised(found["modularity"], len(given.languages))
    method = promised(runs, tasks)
    promises = {**checks.promised(found["mechanics"]), **modular, **method}
    for promise, met in promises.items():
        print(f"{'yes' if met else 'NO '}  {promise}")
    sentence = verdict(modular, method)
    print(sentence)
    content = {"settings": asdict(given), "promises": promises, "verdict": sentence, **found}
    report.write_json(out / "results.json", {**content, "runs": runs})
    _write_scores(out / "scores.csv", runs, [*METRICS, *(["comet"] if given.comet else [])])
    curves = {arm: [Point(**p) for p in results[0]["curve"]] for arm, results in runs.items()}
    report.curves(out, found["base_loss"], curves)
    print(f"results.json, scores.csv, overlap.csv, sparsity.csv, curves and heat maps are in {out}")


def _row(
    arm: str, runs: Sequence[Mapping[str, Any]], tasks: Sequence[Task], ends: Mapping[str, int]
) -> list[str]:
    def both(metric: str, kind: str, digits: int) -> str:
        values = [mean(run, metric, tasks, kind) for run in runs]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    minutes = statistics.mean(run["seconds"] for run in runs) / 60
    scores = [both("nll", "", 4), *(both("chrf", kind, 2) for kind in ("from", "to", ""))]
    scores += [both(metric, "", digits) for metric, digits in ends.items()]
    return [arm, f"{runs[0]['trained']:,}", str(len(runs)), *scores, f"{minutes:.1f}"]


def _ks(given: Settings) -> str:
    values = (given.k_from_encoder, given.k_from_decoder, given.k_to_encoder, given.k_to_decoder)
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def _write_scores(path: Path, runs: Runs, metrics: Sequence[str]) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["arm", "seed", "task", *metrics])
    for arm, results in runs.items():
        for seed, run in enumerate(results):
            for task, scores in run["scores"].items():
                lines.writerow([arm, seed, task, *(f"{scores[m]:.5f}" for m in metrics)])
    report.write(path, text.getvalue().encode())
