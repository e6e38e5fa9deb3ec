"""Ask whether finetuning changes a representation's length or its direction, as RoAd's authors did.

An encoder is finetuned in full, with LoRA and with RoAd, and the first token's representation is
compared with that before, layer by layer. Then classifiers on the frozen encoder see the length of
its representation only, or the direction only. Finished runs are kept and not repeated.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import study_equations as equations
import study_learning as learning
import study_promises as promises
import study_results as results
import study_tasks as tasks
import torch
from peft import LoraConfig, get_peft_model

from recipes_peft import config, encoders, errors, report
from road_peft import RoadConfig

METHODS = ("full", "lora", "road_1", "road_2", "road_4")
HEADS = (*equations.FIRST_LAYERS, "random")  # the last: a standard one on a random encoder


@dataclass(frozen=True)
class Settings:
    model: str = field(metadata={"help": f"folder, hub id, or one of {', '.join(encoders.NAMES)}"})
    data: str = field(metadata={"help": "boolq, glue, tiny, a folder of GLUE or a .jsonl file"})
    out: str = field(metadata={"help": "folder for the results"})
    seed: int
    seeds: int = field(metadata={"help": "number of runs"})
    rotation_task: str = field(metadata={"help": "task of the data to finetune on"})
    methods: list[str] = field(metadata={"help": ", ".join(METHODS)})
    steps: int | None
    epochs: int
    batch_size: int
    full_learning_rate: float
    lora_learning_rate: float
    road_learning_rate: float
    lora_rank: int
    group_size: int = field(metadata={"help": "features whose halves are paired; 2: neighbours"})
    head_tasks: list[str] = field(metadata={"help": "tasks of the data for frozen encoders"})
    head_epochs: int
    train_size: int | None
    held_out: int | None
    max_length: int = field(metadata={"help": "tokens of a text or a pair"})

    def __post_init__(self) -> None:
        config.check(self, zero=("seed",), choices={"methods": METHODS})


def main() -> int:
    default = Path(__file__).with_name("config.yaml")
    given = config.load(Settings, default, sys.argv[1:], str(__doc__))
    out = Path(given.out)
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        (out / "runs").mkdir(parents=True, exist_ok=True)
    runs, floor = rotation(given, out)
    return present(given, out, runs, floor, heads(given, out))


def rotation(given: Settings, out: Path) -> tuple[dict[str, list[Any]], float]:
    """Finetune with every method and seed; also give the score of a constant answer."""
    seeds = range(given.seed, given.seed + given.seeds)
    drawn = {seed: task_of(given, given.rotation_task, seed) for seed in seeds}
    task = drawn[given.seed]

    @functools.cache
    def before() -> torch.Tensor:
        model, tokenizer = load(given, task, given.seed)
        return learning.observe(model, tokenizer, task.held_out, given.max_length)[0]

    runs: dict[str, list[Any]] = {}
    for method in dict.fromkeys(given.methods):
        for seed in seeds:
            key = {k: v for k, v in asdict(given).items() if not k.startswith(("head", "out"))}
            key = {
                **key,
                "methods": method,
                "seed": seed,
                "seeds": 1,
                "rows": tasks.digest(drawn[seed]),
            }
            make = functools.partial(finetuned, given, method, seed, drawn[seed], before)
            file = out / "runs" / f"{task.name}-{method}-{seed}.json"
            runs.setdefault(method, []).append(results.kept(file, key, make))
    return runs, tasks.constant(task)


def finetuned(
    given: Settings, method: str, seed: int, task: tasks.Task, before: Callable[[], torch.Tensor]
) -> dict[str, Any]:
    """Finetune one model and compare its representations of what is held out with those before."""
    model, tokenizer = load(given, task, seed)
    model = adapt(model, method, given)
    rate = getattr(given, f"{method.partition('_')[0]}_learning_rate")
    steps = given.steps or max(1, given.epochs * len(task.train) // given.batch_size)
    how = learning.Training(steps, given.batch_size, rate, given.max_length, seed)
    seconds = learning.finetune(model, tokenizer, task.train, how, f"{method}, seed {seed}")
    after, outputs = learning.observe(model, tokenizer, task.held_out, given.max_length)
    wanted = torch.tensor([row.label for row in task.held_out])
    return {
        "magnitude": equations.change_of_magnitude(before(), after).tolist(),
        "direction": equations.change_of_direction(before(), after).tolist(),
        "length_share": equations.radial_share(before(), after).mean(1).tolist(),
        "score": tasks.score(task.metric, outputs, wanted),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": seconds,
    }


def adapt(model: Any, method: str, given: Settings) -> Any:
    """Prepare a model for a method; what stands on the encoder is trained in full by all."""
    if method == "full":
        return model
    common = {
        "target_modules": learning.block_linears(model),
        "modules_to_save": learning.head_modules(model),
    }
    if method == "lora":
        return get_peft_model(
            model, LoraConfig(r=given.lora_rank, lora_alpha=2 * given.lora_rank, **common)
        )
    with errors.explained(ValueError, before="RoAd does not fit: ", after="; see --group-size"):
        return get_peft_model(
            model, RoadConfig(variant=method, group_size=given.group_size, **common)
        )


def heads(given: Settings, out: Path) -> dict[str, dict[str, list[float]]]:
    """Train every head on the frozen encoder, and a standard one on a random encoder."""
    scores: dict[str, dict[str, list[float]]] = {}
    for name in given.head_tasks:
        task = task_of(given, name, given.seed)
        if task.name in scores:  # a file is one task by any name
            continue
        same = ("model", "max_length", "head_epochs", "seed", "seeds")
        key = {"rows": tasks.digest(task)} | {name: getattr(given, name) for name in same}
        make = functools.partial(frozen, given, task)
        scores[task.name] = results.kept(out / "runs" / f"{task.name}-heads.json", key, make)
    return scores


def frozen(given: Settings, task: tasks.Task) -> dict[str, list[float]]:
    """Give the test scores of the heads on one task, one for each seed."""
    model, tokenizer = load(given, task, given.seed)
    blank = learning.randomised(model, given.seed)
    parts, last = (task.train, task.held_out), slice(-1, None)
    trained, random = (
        [learning.observe(m, tokenizer, rows, given.max_length, last)[0][0] for rows in parts]
        for m in (model, blank)
    )
    found: dict[str, list[float]] = {}
    for kind in HEADS:
        first, features = ("standard", random) if kind == "random" else (kind, trained)
        for seed in range(given.seed, given.seed + given.seeds):
            best = learning.train_head(first, task, features, given.head_epochs, seed)
            found.setdefault(kind, []).append(best["test"])
        print(f"{task.name}, {kind}: {', '.join(f'{score:.3f}' for score in found[kind])}")
    return found


def load(given: Settings, task: tasks.Task, seed: int) -> tuple[Any, Any]:
    model, tokenizer = encoders.load_classifier(given.model, task.outputs, seed=seed)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def task_of(given: Settings, name: str, seed: int) -> tasks.Task:
    return tasks.load(given.data, name, given.train_size, given.held_out, seed)


def present(
    given: Settings, out: Path, runs: dict[str, list[Any]], floor: float, scores: dict[str, Any]
) -> int:
    """Show tables, figures and what was promised; 1 if an adapter changed the embeddings."""
    found = results.changes(runs)
    results.write_csv(out, runs, found, scores)
    results.draw(out, runs, found, scores)
    results.show(runs, found, scores)
    gained = {m: float(np.mean([r["score"] for r in runs[m]])) - floor for m in runs}
    promised = promises.about_changes(found.means, found.correlations, gained)
    promised |= promises.about_heads(scores)
    for promise, met in promised.items():
        print(f"{'yes' if met else 'NO '}  {promise}")
    document = {"settings": asdict(given), "promises": promised, "heads": scores}
    report.write_json(out / "results.json", {**document, **results.document(runs, found)})
    print(f"results.json, three .csv and four .png files are in {out}")
    return 0 if promised.get(promises.EXACT, True) else 1


if __name__ == "__main__":
    sys.exit(errors.run(main))
