"""Train one translator through masks of neurons that its tasks choose, beside controls.

A task is a translation direction. Which neurons fire for it in a trained multilingual model is
counted; those that together make 95 % of the activations are kept for it; then all tasks go on
training the same weights, each through its own neurons. Beside it the same steps without masks,
with random masks, with masks of other tasks, and with adapters.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import arms
import checks
import lass
import overlaps
import results
import translator
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from arms import TUNERS, Tuned, dense, no_extra
from masking import Table, load, save
from prepare import Start, prepare
from settings import Settings
from transformers.utils import logging
from translator import Training

from recipes_peft import config, errors, translation


def main() -> int:
    argv = sys.argv[1:]
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), argv, str(__doc__))
    out = Path(given.out)
    folder = out / f"work-{given.key()}"  # a run with the same settings goes on where it stopped
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # adapters of other tasks
    with errors.explained(ValueError, before=f"precision {given.precision}: "):
        accelerator = Accelerator(mixed_precision=given.precision, kwargs_handlers=[unused])
    start = prepare(given, accelerator, folder)
    tasks = list(start.train)

    base = TUNERS["full"](start.model(), given, tasks, [])
    halves = count_halves(start, "full", base)
    counts = halves[0] + halves[1]
    keep = counts.select(given.percent(tasks))
    analysed = counts.select(lambda *_: given.k_analysis)
    families = [family.split("-") for family in given.families]
    found = {
        "mechanics": checks.mechanics(base.model, keep, start.test, given.bias),
        "modularity": overlaps.modularity(halves, tasks, families, given.k_analysis),
        "base": measure(start, base.model, dense, no_extra),
        "base_loss": translator.mean_loss(
            base.model, start.validated, given.batch_tokens, dense, no_extra
        ),
    }
    if accelerator.is_main_process:
        overlaps.write_tables(out, analysed, keep, tasks)
        overlaps.heat_maps(out / "overlap.png", analysed, tasks)
        save(keep, out / "masks.safetensors")

    done: dict[str, list[dict[str, Any]]] = {arm: [] for arm in given.arms}
    for seed in range(given.seeds):
        for arm in given.arms:
            if seed and arms.parse(arm)[0] != "full":
                continue
            file = folder / f"{arm}-{seed}.json"
            if not file.exists():
                run_arm(start, arm, seed, keep, file)
            done[arm].append(results.read(file))
    if accelerator.is_main_process:
        results.present(given, out, tasks, done, found)
    return 0


def run_arm(start: Start, arm: str, seed: int, reference: Table, file: Path) -> None:
    """Train and measure one arm from the base, with the seed, and keep what was found.

    `reference` is what tasks keep of the base's neurons; what they keep of an adapted or quantised
    model is counted on that model.
    """
    given, tasks, accelerator = start.given, list(start.train), start.accelerator
    saved = file.with_name(f"{file.stem}-unfinished.safetensors")
    tuner, kind = arms.parse(arm)
    set_seed(given.seed + seed)
    model = start.model()
    with errors.explained(ValueError, before=f"{arm} does not fit: "):
        tuned = TUNERS[tuner](model, given, tasks, start.samples(model))
    tuned.model.to(accelerator.device)
    keep, weights, similar = None, None, None
    if kind == "lass":
        weights = sub_networks(start, tuned, seed, file.with_suffix(""))
    elif kind != "dense":
        halves = count_halves(start, tuner, tuned)
        keep = (halves[0] + halves[1]).select(given.percent(tasks))
        similar = overlaps.same_task(keep, reference)

    how = Training.of(
        given,
        steps=given.arm_steps,
        warmup=given.arm_warmup,
        learning_rate=tuned.learning_rate,
        seed=given.seed + 1 + seed,
    )
    name = f"{arm}, seed {seed}"
    with arms.gated(tuned.model, kind, keep, weights, seed, given.bias) as active:
        curve = start.fit(tuned.model, start.train, how, name, active, tuned.extra, saved)
        began = time.perf_counter()
        scores = measure(start, tuned.model, active, tuned.extra)
    seconds = curve[-1].seconds + time.perf_counter() - began
    count = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    if accelerator.is_main_process:
        if seed == 0:
            results.save_model(tuned.model, keep, start.folder / "models" / arm)
        about = {"trained": count, "same_as_base": similar, "seconds": seconds}
        results.keep(file, {**about, "scores": scores, "curve": curve})
        saved.unlink(missing_ok=True)
        shutil.rmtree(file.with_suffix(""), ignore_errors=True)
    accelerator.wait_for_everyone()


def count_halves(start: Start, tuner: str, tuned: Tuned) -> tuple[Table, Table]:
    """Count activations on the validation rows, on every other of them and on the rest."""
    found = []
    for half in (0, 1):
        file = start.folder / f"counts-{tuner}-{half}.safetensors"
        if not file.exists():
            rows = {task: part[half::2] or part for task, part in start.valid.items()}
            padding = start.given.count == "positions"
            size = start.given.batch_tokens
            table = translator.count(
                start.accelerator, tuned.model, rows, size, padding, tuned.extra
            )
            if start.accelerator.is_main_process:
                save(table, file)
            start.accelerator.wait_for_everyone()
        found.append(load(file))
    return found[0], found[1]


def sub_networks(start: Start, tuned: Tuned, seed: int, folder: Path) -> Any:
    """Find the weights that each task keeps for LaSS: train on it alone, prune the smallest.

    What is found of a task is kept in the folder until the arm is finished.
    """
    rows = {task.name: {task: part} for task, part in start.train.items()}
    how = Training.of(start.given, steps=start.given.lass_steps, warmup=1, seed=seed)
    how = replace(how, evaluate_every=how.steps)
    folder.mkdir(exist_ok=True)

    def adapt(name: str) -> None:
        set_seed(start.given.seed + seed)  # the same whatever was found before
        start.fit(tuned.model, rows[name], how, f"LaSS, {name}", dense, no_extra)

    found = lass.find(
        tuned.model, rows, start.given.pruned, adapt, folder, start.accelerator.is_main_process
    )
    set_seed(start.given.seed + seed)
    return found


def measure(start: Start, model: Any, active: Any, extra: Any) -> dict[str, dict[str, Any]]:
    """Give, for each task, the held-out loss per character of the target, and scores."""
    given, found = start.given, {}
    for task, rows in start.test.items():
        loss = translator.nll(model, rows, task.name, given.batch_tokens, active, extra)[0]
        some = rows[: given.translated]
        shape = (given.beams, given.max_length, max(1, given.batch_tokens // given.max_length))
        texts = translator.translate(model, start.tokenizer, some, task.name, *shape, active, extra)
        tokenize = {"zh": "zh", "ja": "char", "th": "char"}.get(task.target, "13a")
        sources, wanted = [r.pair.source for r in some], [r.pair.target for r in some]
        found[task.name] = {
            "nll": loss / sum(len(row.pair.target) for row in rows),
            **asdict(translation.score(texts, wanted, tokenize)),
        }
        if given.comet:
            score = translation.comet(Path(given.comet), sources, texts, wanted)
            found[task.name]["comet"] = score
    return found


if __name__ == "__main__":
    sys.exit(errors.run(main))
