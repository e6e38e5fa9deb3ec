"""RoAd beside LoRA, (IA)3, BitFit and full finetuning, by the protocol of the paper.

An encoder learns to classify and a language model to answer, with each arm and seed; checkpoints
are chosen on one part of the held-out data and tested on another. The arms are added in
`finetune_arms.py`, a cell is trained in `finetune_cells.py`, what was promised stands in
`finetune_results.py`; the protocols are `glue_protocol.py` and `answer_protocol.py`. Every cell is
written when it is finished, and not run again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from finetune_arms import Count
from finetune_cells import Cell, Outcome, Settings, run
from finetune_results import Results, in_points, promises, show, write
from glue_protocol import TASKS

from recipes_peft import config, errors, loop, report


def main() -> int:
    argv, file = sys.argv[1:], Path(__file__).with_name("config.yaml")
    given = config.load(Settings, file, argv, str(__doc__))
    # Tasks that are answered in text have settings of their own, in a section of the file.
    in_text = config.load(Settings, file, [*argv, "--causal"], str(__doc__))
    cells = Path(given.out) / "cells"
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        cells.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    results: Results = {}
    for task in given.tasks:
        settings = given if task in TASKS else in_text
        results[task] = {}
        for arm in settings.arms:
            seeds = range(1 if arm == "base" and task not in TASKS else settings.seeds)
            found = [chosen(task, arm, seed, settings, accelerator, cells) for seed in seeds]
            results[task][arm] = found
            accelerator.print(f"{task}, {arm}: {in_points(found)}")
    if accelerator.is_main_process:
        present(given, in_text, Path(given.out), results)
    return 0


def chosen(
    task: str, arm: str, seed: int, given: Settings, accelerator: Accelerator, folder: Path
) -> tuple[Cell, Outcome]:
    """Train with each learning rate; give the cell that is best on what chooses checkpoints."""
    rates = given.learning_rates[: 1 if arm == "base" and task not in TASKS else None]
    mark = hashlib.sha256(json.dumps(given.fixed(), sort_keys=True).encode()).hexdigest()[:8]
    done = []
    for rate in rates:
        cell = Cell(task, arm, seed, float(rate))
        file, saved = folder / f"{cell.name}.json", folder / f"{cell.name}-{mark}.safetensors"
        outcome = read(file, given)
        if outcome is None:
            outcome = run(cell, given, accelerator, saved)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                kept = {"settings": given.fixed(), "outcome": asdict(outcome)}
                report.write_json(file, kept)
                saved.unlink(missing_ok=True)
        done.append((cell, outcome))
    return max(done, key=lambda pair: pair[1].valid)


def read(file: Path, given: Settings) -> Outcome | None:
    """Give the outcome of a cell that is there already, None if it is not or has other settings."""
    if not file.exists():
        return None
    with errors.explained(ValueError, before=f"{file} is torn: ", after="; delete it"):
        kept = json.loads(file.read_text(encoding="utf-8"))
    if kept["settings"] != given.fixed():
        return None
    values = kept["outcome"]
    points = [loop.Point(**point) for point in values["points"]]
    return Outcome(**{**values, "count": Count(**values["count"]), "points": points})


def present(given: Settings, in_text: Settings, out: Path, results: Results) -> None:
    """Show the tables and what was promised, and write all of it to the folder."""
    show(results)
    kept = promises(results)
    for promise, met in kept.items():
        print(f"{'yes' if met else 'NO '}  {promise}")
    settings = {"classification": asdict(given), "answers": asdict(in_text)}
    write(out, results, {"settings": settings, "promises": kept})
    print(f"results.json, results.csv and results.png are in {out}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
