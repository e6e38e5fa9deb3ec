"""Does what was learnt in English cross languages, or only work inside each of them?

A multilingual encoder is trained on one language. It is tested on instances whose two segments are
in two languages, for all ordered pairs, beside the usual test with both in one. The difference is
what shortcuts inside a language were worth. Beside it: baselines that know no language, training
on shuffled words and on mixed languages, and RoAd, LoRA, every weight, ApiQ's low bits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import analysis
import arms
import results
from accelerate import Accelerator
from accelerate.utils import set_seed
from answering import Answering
from arms import Study
from classifying import Classifying
from grid import Cells, cross_grid
from parallel_pairs import Row
from prepare import Data, prepare, training_rows
from settings import Settings
from shortcuts import OverlapBaseline, ProximityBaseline
from transformers.utils import logging

from recipes_peft import config, errors, loop, report


def main() -> int:
    argv = sys.argv[1:]
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), argv, str(__doc__))
    out = Path(given.out)
    folder = out / f"work-{given.key()}"  # a run with the same settings goes on where it stopped
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise errors.UserError("this recipe runs in one process; start it with python")
    data = prepare(given)
    task = Answering(given, data) if data.answers else Classifying(given, data)

    found: dict[str, list[dict[str, Any]]] = {}
    cells: dict[str, list[Cells]] = {}
    for name, predict in baselines(data).items():
        several = lambda rows, name=name, one=predict: {name: list(map(one, rows))}  # noqa: E731
        cells[name] = [cross_grid(several, [name], data.test, quiet=True)[name]]
        hard = analysis.hard_within(several, [name], data)[name]
        found[name] = [{"hard": hard}]
    for study in arms.studies(given.arms, given.once, given.seeds):
        one = Trained(study, given, data, task, accelerator, folder)
        for arm, (about, grid) in one.tested().items():
            found.setdefault(arm, []).append(about)
            cells.setdefault(arm, []).append(grid)
    results.present(given, out, data, task, found, cells)
    return 0


def baselines(data: Data) -> dict[str, Any]:
    """Give what answers a row without a model: shortcuts, fitted on one language, and checks.

    `oracle` is told what is right; `constant` always gives the most frequent answer.
    """
    rows = data.train.cell(data.language, data.language)
    if data.answers:
        return {
            "proximity": ProximityBaseline.fit(rows),
            "oracle": lambda row: row.target.text,
        }
    labels = [row.target for row in rows]
    most = max(sorted(set(labels)), key=labels.count)
    return {
        "overlap": OverlapBaseline.fit(rows),
        "constant": lambda row: most,
        "oracle": lambda row: row.target,
    }


class Trained:
    """A base and what is trained on it; all of it is done when it is first needed, or read."""

    def __init__(
        self,
        study: Study,
        given: Settings,
        data: Data,
        task: Any,
        accelerator: Accelerator,
        folder: Path,
    ) -> None:
        self.study, self.given, self.data, self.task = study, given, data, task
        self.accelerator, self.folder = accelerator, folder
        self.names = list(study.conditions if study.shared else study.arms)

    def file(self, arm: str) -> str:
        return f"{arm}-{self.study.seed}"

    @cached_property
    def model(self) -> Any:
        """Build the base with all adapters, and train them one after the other, or read them."""
        study, given = self.study, self.given
        set_seed(study.seed)
        progress = self.folder / f"calibration-{self.file(study.tuner)}"
        plain = training_rows(self.data, "plain", study.seed)
        with errors.explained(ValueError, before=f"{study.tuner} does not fit: "):
            model = arms.build(study, given, self.task, plain, self.accelerator.device, progress)
        for arm, condition in zip(study.arms, study.conditions, strict=True):
            kept = self.folder / "models" / self.file(arm)
            if study.shared:
                model.set_adapter(condition)  # and train no other one
            if kept.exists():
                arms.restore(model, study, condition, kept)
            else:
                self.train(model, arm, condition)
                arms.keep(model, study, condition, kept)
        return model

    def train(self, model: Any, arm: str, condition: str) -> None:
        """Train what has a gradient under a condition; write what it took."""
        given, seed = self.given, self.study.seed
        set_seed(seed)  # whatever was trained before on this base
        rows = self.task.rows(training_rows(self.data, condition, seed))
        steps = given.steps or max(1, given.epochs * len(rows) // given.batch_size)
        how = loop.Training(
            steps=steps,
            batch_size=given.batch_size,
            micro_batch_size=given.micro_batch_size,
            learning_rate=getattr(given, arms.TUNERS[self.study.tuner].rate),
            evaluate_every=max(1, steps // given.evaluations),
            seed=seed,
            warmup=given.warmup,
            schedule=given.schedule,
            # Adapters that multiply must not be pulled towards zero.
            weight_decay=given.weight_decay if self.study.tuner == "full" else 0.0,
        )
        # Weights are chosen on the training language alone: never by the grid.
        language = self.data.language
        held_out = self.data.held_out.cell(language, language)
        measured = partial(self.task.measured, model, held_out)
        before = measured()
        name, saved = f"{arm}, seed {seed}", self.folder / f"{self.file(arm)}.safetensors"
        points = loop.fit(self.accelerator, model, rows, self.task.join, how, measured, name, saved)
        about = {
            "seed": seed,
            "trained": sum(p.numel() for p in arms.trained_parameters(model).values()),
            "seconds": points[-1].seconds,
            "untrained_loss": before[0],
            "curve": [asdict(point) for point in points],
        }
        report.write_json(self.folder / f"{self.file(arm)}.json", about)
        saved.unlink(missing_ok=True)

    def predict(self, rows: Sequence[Row]) -> Mapping[str, list[Any]]:
        """Predict with all adapters, each row of a batch with the one that it names."""
        if self.study.shared and len(self.names) == 1:
            self.model.set_adapter(self.names[0])
        return self.task.predict(self.model, rows, self.names)

    def tested(self) -> dict[str, tuple[dict[str, Any], Cells]]:
        """Give for each arm what its training took, its hard rows, and its grid."""
        title = f"grid of {', '.join(self.study.arms)}, seed {self.study.seed}"
        place = self.folder / f"grid-{self.file('-'.join(self.study.arms))}"
        place.mkdir(exist_ok=True)
        grids = cross_grid(self.predict, self.names, self.data.test, place, title)
        file = place / "hard.json"
        if file.exists():
            hard = json.loads(file.read_text(encoding="utf-8"))
        else:
            hard = analysis.hard_within(self.predict, self.names, self.data)
            report.write_json(file, hard)
        found = {}
        for arm, name in zip(self.study.arms, self.names, strict=True):
            about = json.loads((self.folder / f"{self.file(arm)}.json").read_text(encoding="utf-8"))
            found[arm] = ({**about, "hard": hard[name]}, grids[name])
        return found


if __name__ == "__main__":
    sys.exit(errors.run(main))
