"""Train two skills on two halves of one rotation, and measure what both halves do together.

The output of one block is rotated at the last token of the prompt. Each training example switches
on the half of its skill; a test prompt is answered with none, either, or both. Beside it stand
LoReFT with two subspaces, one RoAd trained on both skills at once, and two RoAds multiplied.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import scores
import skills
import torch
import toys
from composing import ARMS, Bench
from prefixes import Prefixes

from recipes_peft import config, data, errors, models, report

EXPERIMENTS = ("model", "toy")
FREE = ("out", "seeds", "arms", "experiment", "generated_rows", "kept_prompts")  # of consequence


@dataclass(frozen=True)
class Settings:
    experiment: str = field(metadata={"help": ", ".join(EXPERIMENTS)})
    model: str = field(metadata={"help": f"folder, hub id, or one of {', '.join(models.NAMES)}"})
    task: str = field(metadata={"help": ", ".join(skills.TASKS)})
    data: str = field(metadata={"help": "titles, tiny, a .jsonl, .json or text file, or a hub id"})
    data_b: str | None = field(metadata={"help": "the same, for the second skill"})
    instruction: str = field(metadata={"help": "for examples that have none of their own"})
    template: str | None = field(metadata={"help": "prompt with {prompt} in it"})
    out: str = field(metadata={"help": "folder for the results; a run goes on where it ended"})
    seeds: int = field(metadata={"help": "how many, from 0 on"})
    arms: list[str] = field(metadata={"help": ", ".join(ARMS)})
    layer: int = field(metadata={"help": "block whose output is rotated, from 0 on"})
    last_tokens: int = field(metadata={"help": "of the prompt, that are rotated"})
    learning_rate: float
    loreft_rank: int
    loreft_learning_rate: float
    examples: int = field(metadata={"help": "to train on, for each skill"})
    epochs: int
    batch_size: int
    max_length: int = field(metadata={"help": "tokens of a prompt"})
    answer_tokens: int = field(metadata={"help": "tokens of an answer to train on, at most"})
    held_out: int = field(metadata={"help": "prompts to measure on"})
    dtype: str
    max_new_tokens: int
    no_repeat_ngram_size: int
    repetition_penalty: float
    generated_rows: int = field(metadata={"help": "answers to generate at a time"})
    kept_prompts: int = field(metadata={"help": "whose keys and values stay in memory"})
    toy_pretraining: int = field(metadata={"help": "steps"})
    toy_steps: int
    toy_samples: int

    def __post_init__(self) -> None:
        config.check(
            self,
            ("layer", "no_repeat_ngram_size", "kept_prompts"),
            {"experiment": EXPERIMENTS, "task": skills.TASKS, "arms": ARMS},
        )
        if self.loreft_rank % 2:
            raise errors.UserError(f"loreft_rank is {self.loreft_rank}; it must be even")
        if self.template is not None and "{prompt}" not in self.template:
            raise errors.UserError("template has no {prompt}; write it where the prompt stands")


def main() -> int:
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), sys.argv[1:], __doc__)
    out = Path(given.out)
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        out.mkdir(parents=True, exist_ok=True)
    return toy(given, out) if given.experiment == "toy" else model(given, out)


def model(given: Settings, out: Path) -> int:
    """Run every arm with every seed that is not there yet; 1 if an exact promise is broken."""
    bench = prepare(given)
    settings = {name: value for name, value in asdict(given).items() if name not in FREE}
    found: dict[str, dict[str, list[scores.Rates]]] = {}
    promises: dict[str, bool] = {}
    texts: dict[str, dict[str, list[str]]] = {}  # of the first seed
    for seed in range(given.seeds):  # the arms of a seed share its prompts
        for arm in given.arms:
            path = out / f"{arm}-{seed}.json"
            run = once(path, settings, partial(measured, bench, arm, seed))
            for choice, values in run["rates"].items():
                found.setdefault(arm, {}).setdefault(choice, []).append(values)
            for promise, kept in run["promises"].items():
                promises[promise] = promises.get(promise, True) and kept
            texts.setdefault(arm, run["texts"])
    first, second = bench.task.skills
    answers = scores.questions(found, first, second)
    scores.show_answers(bench.test[:4], texts)
    title = f"{given.model}, {given.seeds} seeds, {len(bench.test)} prompts: mean and 95 % interval"
    return present(given, out, title, found, promises, answers)


def prepare(given: Settings) -> Bench:
    """Load model and data, and hold out what to measure on."""
    language, tokenizer = models.load(given.model, given.dtype)
    language.to("cuda" if torch.cuda.is_available() else "cpu")
    layers = len(language.get_decoder().layers)
    if given.layer >= layers:
        raise errors.UserError(f"layer is {given.layer}; the model's are 0 to {layers - 1}")
    second = given.data if given.data_b is None else given.data_b
    examples = skills.read(second, given.instruction, given.template)
    theirs, test = data.split(examples, given.held_out, 0)
    ours = theirs
    if given.data_b is not None:
        ours = skills.read(given.data, given.instruction, given.template)
    needed = given.examples * (1 if given.data_b else 2)
    if min(len(ours), len(theirs)) < needed:
        raise errors.UserError(
            f"there are {min(len(ours), len(theirs))} examples to train on; {needed} are needed:"
            " lower --examples or give more data"
        )
    prefixes = Prefixes(language, tokenizer.pad_token_id, given.last_tokens, given.kept_prompts)
    task = skills.TASKS[given.task]
    return Bench(language, tokenizer, task, (ours, theirs), test, given, prefixes)


def measured(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """Train an arm with a seed, and give what it wrote and how good that is."""
    began = time.perf_counter()
    texts, promises = ARMS[arm](bench, seed)
    rates = {name: scores.rates(bench.task, bench.test, each) for name, each in texts.items()}
    seconds = time.perf_counter() - began
    return {"rates": rates, "promises": promises, "seconds": seconds, "texts": texts}


def toy(given: Settings, out: Path) -> int:
    """Run the toys; 1 if what is promised exactly does not hold."""
    torch.set_num_threads(1)  # for nets of this size more of them cost time
    how = toys.Toy(given.toy_pretraining, given.toy_steps, given.toy_samples)
    settings, status = asdict(how), 0
    for kind in ("linear", "non-linear"):
        found: dict[str, dict[str, list[scores.Rates]]] = {}
        for seed in range(given.seeds):
            path = out / f"toy-{kind}-{seed}.json"
            run = once(path, settings, partial(toys.statistical, kind, seed, how))
            for arm, choices in run.items():
                for choice, values in choices.items():
                    found.setdefault(arm, {}).setdefault(choice, []).append(values)
        mean = {c: scores.interval([r["both"] for r in v]) for c, v in found["halves"].items()}
        best = max(value.mean for choice, value in mean.items() if choice != "both")
        gained = mean["both"].mean > best
        promises = toys.exact(0, how) if kind == "linear" else {}
        said = f"{mean['both'].mean:.3f} against {best:.3f}"
        answers = {"both halves are right more often than either or none": (gained, said)}
        title = f"{kind} read-out, {given.seeds} seeds: mean and 95 % interval"
        status |= present(given, out, title, found, promises, answers, f"toy-{kind}")
    return status


def once(path: Path, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """Give what an earlier run with the same settings wrote, or make and write it."""
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept["result"]
    result = make()
    report.write_json(path, {"settings": settings, "result": result})
    return result


def present(
    given: Settings,
    out: Path,
    title: str,
    found: Any,
    promises: Mapping[str, bool],
    answers: Mapping[str, tuple[bool, str]],
    name: str = "results",
) -> int:
    """Show the table, what was promised and what was asked, and write all of it to the folder."""
    scores.show(title, found)
    for promise, kept in promises.items():
        print(f"{'yes' if kept else 'NO '}  promised: {promise}")
    for question, (holds, by) in answers.items():
        print(f"{'yes' if holds else 'no '}  asked: {question} ({by})")
    scores.write(out, name, found)
    asked = {question: {"holds": holds, "by": by} for question, (holds, by) in answers.items()}
    kept = {"settings": asdict(given), "promises": promises, "questions": asked, "rates": found}
    report.write_json(out / f"{name}.json", kept)
    print(f"{name}.json, {name}.csv and {name}.png are in {out}")
    return 0 if all(promises.values()) else 1


if __name__ == "__main__":
    sys.exit(errors.run(main))
