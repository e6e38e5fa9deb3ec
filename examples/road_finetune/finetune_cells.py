"""One cell of the comparison: a task, an arm, a seed and a learning rate; trained, then tested."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import answer_protocol
import finetune_arms
import glue_protocol
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from answer_protocol import SUITES, Question
from finetune_arms import ARMS, Count
from glue_protocol import TASKS, Pair

from recipes_peft import config, encoders, errors, loop, models

__all__ = ["Cell", "Outcome", "Settings", "run"]


@dataclass(frozen=True)
class Settings:
    tasks: list[str] = field(metadata={"help": f"{', '.join(TASKS)}; {', '.join(SUITES)}"})
    arms: list[str] = field(metadata={"help": ", ".join(ARMS)})
    seeds: int = field(metadata={"help": "how many: 0, 1, ..."})
    out: str = field(metadata={"help": "folder for the results, where a run also goes on"})
    encoder: str = field(
        metadata={"help": f"folder, hub id, or one of {', '.join(encoders.NAMES)}"}
    )
    model: str = field(metadata={"help": f"folder, hub id, or one of {', '.join(models.NAMES)}"})
    glue: str = field(metadata={"help": "GLUE's id on the hub, or a folder of its tasks"})
    data: str = field(
        metadata={"help": "to learn answers from: choices, tiny, a file, or a folder of train.json"}
    )
    test_data: str | None = field(
        metadata={"help": "folder of NAME/test.json; if not given, a part of the data"}
    )
    learning_rates: list[str] = field(
        metadata={"help": "RoAd's, of which validation chooses; other arms have multiples"}
    )
    lora_rank: int
    group_size: int
    steps: int | None
    epochs: int
    evaluate_every: int | None = field(metadata={"help": "steps; if not given, an epoch"})
    batch_size: int
    micro_batch_size: int
    max_length: int = field(metadata={"help": "tokens"})
    max_new_tokens: int
    held_out: int = field(metadata={"help": "examples held out where there is no set for it"})
    choosing: int = field(metadata={"help": "questions that choose the checkpoint"})
    dtype: str = field(metadata={"help": "of weights that are not trained"})

    def __post_init__(self) -> None:
        config.check(self, (), {"tasks": [*TASKS, *SUITES], "arms": ARMS})
        for rate in self.learning_rates:
            try:
                fine = float(rate) > 0
            except ValueError:
                fine = False
            if not fine:
                raise errors.UserError(
                    f"learning_rates has {rate!r}; give numbers above zero, such as 3e-3"
                )

    def fixed(self) -> dict[str, Any]:
        """Give the settings that a cell's numbers depend on, beside the cell itself."""
        chosen = ("tasks", "arms", "seeds", "out", "learning_rates")
        return {name: value for name, value in asdict(self).items() if name not in chosen}


@dataclass(frozen=True)
class Cell:
    task: str
    arm: str
    seed: int
    rate: float  # RoAd's, of which the arm has a multiple

    @property
    def name(self) -> str:
        return f"{self.task}-{self.arm}-{self.seed}-{self.rate:g}"


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: on what chose the checkpoint, and on each test set."""

    valid: float
    valid_loss: float
    test: dict[str, float]
    count: Count
    seconds: float  # in training
    points: list[loop.Point]
    answered: float | None = None  # share of tests with an answer of the form asked for

    @property
    def score(self) -> float:
        return sum(self.test.values()) / len(self.test)


def run(cell: Cell, given: Settings, accelerator: Accelerator, saved: Path) -> Outcome:
    """Train and test a cell; `saved` is where a long training goes on from."""
    set_seed(cell.seed)
    return (classify if cell.task in TASKS else answer)(cell, given, accelerator, saved)


def training(cell: Cell, given: Settings, rows: int) -> loop.Training:
    """Give the protocol: AdamW without decay, a linear schedule, a tenth of it warmup."""
    epoch = max(1, rows // given.batch_size)
    return loop.Training(
        steps=given.steps or given.epochs * epoch,
        batch_size=given.batch_size,
        micro_batch_size=given.micro_batch_size,
        learning_rate=cell.rate * ARMS[cell.arm].rate,
        evaluate_every=given.evaluate_every or epoch,
        seed=cell.seed,
    )


def add(cell: Cell, given: Settings, model: Any, task_type: str) -> tuple[Any, Count]:
    """Add the arm to a model."""
    advice = "; change --arms, --group-size or --lora-rank"
    with errors.explained(ValueError, before=f"{cell.arm} does not fit: ", after=advice):
        added = ARMS[cell.arm].add(model, task_type, given.group_size, given.lora_rank)
    return added, finetune_arms.count(added)


def dtype_of(cell: Cell, given: Settings) -> str:
    return "float32" if ARMS[cell.arm].own_weights else given.dtype


def best(points: Sequence[loop.Point]) -> loop.Point:
    """Give the point whose weights were kept: the first of those with the highest score."""

    def rank(point: loop.Point) -> float:
        return -math.inf if point.score is None or math.isnan(point.score) else point.score

    return max(points, key=rank)


# ---- classification -----------------------------------------------------------------------------


def classify(cell: Cell, given: Settings, accelerator: Accelerator, saved: Path) -> Outcome:
    task = TASKS[cell.task]
    with accelerator.main_process_first():  # it fetches what the others then find
        train, development = glue_protocol.read(cell.task, given.glue, given.held_out)
        model, tokenizer = encoders.load_classifier(
            given.encoder, task.classes, dtype_of(cell, given), cell.seed
        )
    chosen_by, test = glue_protocol.cut(development, cell.seed, task.choosing)
    random.Random(cell.seed).shuffle(train)
    most = given.steps * given.batch_size if given.steps else None
    model, count = add(cell, given, model.to(accelerator.device), "SEQ_CLS")

    def row(pair: Pair) -> dict[str, Any]:
        texts = [pair.first] if pair.second is None else [pair.first, pair.second]
        label = pair.label if task.classes == 1 else int(pair.label)
        encoded = tokenizer(*texts, truncation=True, max_length=given.max_length)
        return {**encoded, "labels": label}

    def join(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return dict(tokenizer.pad(rows, return_tensors="pt"))

    def measured(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
        loss, found = predict(model, rows, join, 4 * given.micro_batch_size)
        return loss, task.metric(found, [row["labels"] for row in rows])

    rows, chosen_rows = list(map(row, train[:most])), list(map(row, chosen_by))
    how = training(cell, given, len(rows))
    points = loop.fit(
        accelerator, model, rows, join, how, lambda: measured(chosen_rows), cell.name, saved
    )
    kept = best(points)
    score = measured(list(map(row, test)))[1]
    return Outcome(
        kept.score or 0.0, kept.held_out_loss, {cell.task: score}, count, points[-1].seconds, points
    )


@torch.no_grad()
def predict(
    model: Any, rows: Sequence[dict[str, Any]], join: Any, size: int
) -> tuple[float, list[float]]:
    """Give the mean loss, and the class or value of each row, in order."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    total, found = 0.0, {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        out = model(**loop.to(join([rows[i] for i in chosen]), model.device))
        logits = out.logits.float()
        values = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)
        total += out.loss.item() * len(chosen)
        found |= dict(zip(chosen, values.tolist(), strict=True))
    return total / len(rows), [found[i] for i in range(len(rows))]


# ---- answers ------------------------------------------------------------------------------------


def answer(cell: Cell, given: Settings, accelerator: Accelerator, saved: Path) -> Outcome:
    suite = SUITES[cell.task]
    with accelerator.main_process_first():
        train, chosen_by, test = answer_protocol.load(
            suite, given.data, given.test_data, given.held_out, given.choosing, cell.seed
        )
        model, tokenizer = models.load(given.model, dtype_of(cell, given))
    most = given.steps * given.batch_size if given.steps else None
    model, count = add(cell, given, model.to(accelerator.device), "CAUSAL_LM")

    def encoded(questions: Sequence[Question]) -> list[Any]:
        return [answer_protocol.encode(q, suite, tokenizer, given.max_length) for q in questions]

    def correct(questions: Sequence[Question], rows: Sequence[Any]) -> list[tuple[bool, bool]]:
        """Say of each question whether there is an answer of its form, and whether it is right."""
        size = given.micro_batch_size
        texts = loop.generate(model, tokenizer, rows, given.max_new_tokens, size)
        forms = [answer_protocol.form_of(question.answer) for question in questions]
        return [
            (
                answer_protocol.extract(form, text) is not None,
                answer_protocol.right(form, text, question.answer),
            )
            for question, form, text in zip(questions, forms, texts, strict=True)
        ]

    rows, chosen_rows = encoded(train[:most]), encoded(chosen_by)

    def score() -> float:
        return sum(is_right for _, is_right in correct(chosen_by, chosen_rows)) / len(chosen_by)

    if cell.arm == "base":
        loss = loop.held_out_loss(
            model, chosen_rows, given.micro_batch_size, tokenizer.pad_token_id
        )
        points = [loop.Point(0, 0.0, loss, loss, score())]
    else:
        how = training(cell, given, len(rows))
        points = loop.train(
            accelerator, model, rows, chosen_rows, how, tokenizer, cell.name, score, saved
        )
    kept, marks = best(points), correct(test, encoded(test))
    scores: dict[str, list[bool]] = {}
    for question, (_, is_right) in zip(test, marks, strict=True):
        scores.setdefault(question.dataset, []).append(is_right)
    return Outcome(
        kept.score or 0.0,
        kept.held_out_loss,
        {name: sum(values) / len(values) for name, values in scores.items()},
        count,
        points[-1].seconds,
        points,
        sum(answered for answered, _ in marks) / len(marks),
    )
